"""States of dual encoders, whose towers see frames and words apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .source import TOKEN_MASKS, Batch, StateSource, VideoTextStates, check_token_mask


def find_dual_encoder(model: nn.Module) -> PreTrainedModel | None:
    """The model among these modules that gives features of what is seen and, apart, of text: CLIP, SigLIP, X-CLIP."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel) and _is_dual_encoder(m)), None)


class TowerStates(StateSource):
    """Frames and words from the towers of a dual encoder, in the space where it compares them.

    Of several images for each text these are the frames; of a single one, its patches are. Words are the valid tokens
    of the text, also where these are padded without an `attention_mask`, as SigLIP's; a batch's `text_token_mask` says
    which of them count, or how much.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config()
        ends = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        self.ends = [token for token in ends if isinstance(token, int)]

    def samples(self, batch: Batch) -> Tensor | None:
        """Samples with words."""
        mask = self._word_mask(batch)
        return batch["input_ids"].new_tensor(len(batch["input_ids"])) if mask is None else (mask > 0).any(1).sum()

    def words(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """All of `input_ids` that the mask leaves."""
        return batch["input_ids"], self._word_mask(batch)

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """The states of both towers' last blocks."""
        words = outputs.text_model_output.last_hidden_state
        text_tower = getattr(self.model, "text_model", None)
        words = _projected(words, self.model, "text_projection", getattr(text_tower, "head", None))
        return VideoTextStates(self._frames(outputs, len(words)), words, word_mask=self._word_mask(batch), met=False)

    def _word_mask(self, batch: Batch) -> Tensor | None:
        valid, counts, ids = batch.get("attention_mask"), batch.get(TOKEN_MASKS[1]), batch["input_ids"]
        if valid is None and self.ends:
            inside = ~torch.isin(ids, ids.new_tensor(self.ends))
            valid = inside.flip(1).cumsum(1).flip(1) > 0  # up to the last token that is none of those at the end
        if counts is None:
            return valid
        if counts.device.type == "cpu":
            check_token_mask(TOKEN_MASKS[1], counts)
        return counts if valid is None else counts * (valid > 0)

    def _frames(self, outputs: Any, batch: int) -> Tensor:
        if getattr(outputs, "mit_output", None) is not None:  # X-CLIP's frames, after they have seen each other
            return outputs.mit_output.last_hidden_state
        images = outputs.image_embeds
        if len(images) % batch:
            raise ValueError(f"PVLA needs the same number of frames for each text: {len(images)} for {batch} texts.")
        if len(images) > batch:
            return images.unflatten(0, (batch, -1))
        patches = outputs.vision_model_output.last_hidden_state
        if isinstance(getattr(self.model, "visual_projection", None), nn.Module):
            # CLIP normalises the one state that it pools; SigLIP and others all of them, in their towers.
            patches = _applied(getattr(self.model.vision_model, "post_layernorm", nn.Identity()), patches)
        return _projected(patches, self.model, "visual_projection", None)


def _is_dual_encoder(model: PreTrainedModel) -> bool:
    sees = hasattr(model, "get_image_features") or hasattr(model, "get_video_features")
    return sees and hasattr(model, "get_text_features")


def _projected(states: Tensor, model: nn.Module, name: str, head: nn.Module | None) -> Tensor:
    projection = getattr(model, name, head)
    return _applied(projection, states) if isinstance(projection, nn.Module) else states


def _applied(module: nn.Module, states: Tensor) -> Tensor:
    """Outside of the model's autocast, which has made float32 of what the model returns."""
    weight = next(module.parameters(), states)
    return module(states.to(weight.dtype))
