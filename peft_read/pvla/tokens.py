"""Which tokens of a sequence are video and which are text."""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .source import TOKEN_MASKS, Batch, check_token_mask, token_masks
from .words import TemplateTokens, choose_words


# Entries of a model's config that hold the ids that stand for visual tokens in `input_ids`.
PLACEHOLDERS = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")


class TokenMasks:
    """Tells a batch's video tokens from its text: by the batch's masks, else by the placeholders in `input_ids`.

    Text that isn't told by a mask is without special tokens and what a chat template puts behind them.

    Args:
        model: whose configs name the placeholders.
        words: which text tokens are words: `"all"`, `"answer"` (those with a label), or `"prompt"` (those without).
        template: tokens that are never words.
    """

    def __init__(
        self,
        model: nn.Module,
        words: str = "all",
        template: TemplateTokens = TemplateTokens(),  # noqa: B008
    ) -> None:
        self.placeholders = _placeholder_ids(model)
        self.chosen = words
        self.template = template

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which positions are video, `(batch, time)` bool; and which are text, bool or the weights of words.

        Raises:
            ValueError: if neither masks nor placeholders tell, or a mask has values that it can't have.
        """
        video, text = (batch.get(name) for name in TOKEN_MASKS)
        ids, valid = batch.get("input_ids"), batch.get("attention_mask")
        for name, mask in token_masks(batch).items():
            if mask.device.type == "cpu":  # no value is waited for elsewhere, but where one batch is checked
                check_token_mask(name, mask)
        if video is None:
            if ids is None or not self.placeholders:
                raise ValueError(
                    "PVLA can't tell which tokens are video and which are text: the model's config names no "
                    "placeholder id (`video_token_id`, `image_token_id`). Let the dataset or its collator give "
                    f"{TOKEN_MASKS[0]!r} and {TOKEN_MASKS[1]!r}, `(batch, time)` each; a dual encoder takes "
                    "pvla_states='towers'; or give the Trainer a function as `pvla_states`."
                )
            video = reduce(or_, (ids == token for token in self.placeholders))
        video = video.bool()
        if text is None:
            if TOKEN_MASKS[0] in batch:
                self._check_text_is_known(video, ids, valid)
            text = ~video
            if self.template.special and ids is not None and ids.shape == video.shape:
                text = text & ~self.template.among(ids)
        elif not text.is_floating_point():
            text = text.bool()
        text = choose_words(text, batch, self.chosen)
        if valid is not None and valid.shape == video.shape:
            video, text = video & valid.bool(), text * valid.bool()
        return video, text * ~video  # a mask of words may say something of placeholders, too

    @staticmethod
    def _check_text_is_known(video: Tensor, ids: Tensor | None, valid: Tensor | None) -> None:
        for name, column in (("input_ids", ids), ("attention_mask", valid)):
            if column is not None and column.ndim == 2 and column.shape != video.shape:
                raise ValueError(
                    f"{TOKEN_MASKS[0]!r} is over {tuple(video.shape)} positions, {name} over {tuple(column.shape)}: "
                    "nothing tells words from padding and special tokens. Let the collator give "
                    f"{TOKEN_MASKS[1]!r}, too."
                )

    def describe(self, batch: Batch) -> str:
        """What is taken for video and for words in a batch, in a sentence.

        Raises:
            ValueError: if its masks have values that they can't have, or don't tell.
        """
        for name, mask in token_masks(batch).items():
            check_token_mask(name, mask)
        video, text = self(batch)
        ids = "the batch's mask" if TOKEN_MASKS[0] in batch else f"the ids {self.placeholders}"
        return (
            f"PVLA takes {ids} for video. The first sample has {int(video[0].sum())} video tokens and "
            f"{int((text[0] > 0).sum())} words among {video.shape[1]} tokens."
        )


def gathered(states: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The masked positions moved to the front and the rest cut off: `(blocks * batch, longest, dim)` and their mask.

    Costs are all pairs of positions, so leaving the rest in would cost more than finding out how many there are.

    Args:
        states: `(batch, time, dim)` of each block.
        mask: `(batch, time)`, bool or weights.
    """
    counts = mask > 0
    longest = max(int(counts.sum(1).max()), 1)
    order = counts.logical_not().long().argsort(dim=1, stable=True)[:, :longest]
    front = torch.cat([x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in states])
    return front, mask.gather(1, order).repeat(len(states), 1)


def _placeholder_ids(model: nn.Module) -> list[int]:
    configs = [owner.config for owner in model.modules() if isinstance(owner, PreTrainedModel)]
    found = {getattr(config, name, None) for config in configs for name in PLACEHOLDERS}
    return sorted(token for token in found if isinstance(token, int))
