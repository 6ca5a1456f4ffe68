"""Where the states of videos and sentences come from in a running model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.targets import owner_of, takes_text
from ..read.layer import ReadLayer


# Columns of a batch that say which positions of the model's sequence are video and which are text.
TOKEN_MASKS = ("video_token_mask", "text_token_mask")
# Entries of a model's config that hold the ids that stand for visual tokens in `input_ids`.
PLACEHOLDERS = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")
BLOCK_SOURCES = ("last_block", "all_blocks", "bottleneck")
SOURCES = ("auto", *BLOCK_SOURCES, "towers")

Batch: TypeAlias = Mapping[str, Any]


class VideoTextStates(NamedTuple):
    """States that PVLA compares.

    Attributes:
        video: `(batch, frames, dim)`.
        words: `(batch, words, dim)`.
        frame_mask: `(batch, frames)`, true where a frame is valid; None: all are.
        word_mask: `(batch, words)`, likewise.
    """

    video: Tensor
    words: Tensor
    frame_mask: Tensor | None = None
    word_mask: Tensor | None = None


StateFunction: TypeAlias = Callable[[nn.Module, Batch, Any], VideoTextStates]


class StateSource(ABC):
    """Gives the states of a batch that has just run through the model.

    Attributes:
        blocks: how many states it gives of each sample, those of one block after those of another.
    """

    blocks = 1

    @abstractmethod
    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """The states of the last forward inside of `recording`.

        Args:
            model: as the Trainer calls it.
            batch: what the model was given, with the token masks where there are some.
            outputs: what it returned.
        """

    def samples(self, batch: Batch) -> Tensor | None:
        """How many samples `states` will have with something to align; None where that isn't known before it runs."""
        return None

    def words(self, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
        """`input_ids` and which of them are the words of `states`, `(batch, time)`; None where that isn't known."""
        return None

    def check(self, example: Batch) -> None:
        """Raise a `ValueError` if a batch like this one doesn't tell what is video and what is text."""
        return

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In this context the model's forwards are listened to."""
        yield


class FunctionStates(StateSource):
    """States by a function of the user's: `function(model, batch, outputs)`."""

    def __init__(self, function: StateFunction) -> None:
        self.function = function

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """What the function gives."""
        return self.function(model, batch, outputs)


class TowerStates(StateSource):
    """Frames and words from the towers of a dual encoder (CLIP, SigLIP, X-CLIP), in the space where it compares them.

    Of several images for each text these are the frames; of a single one, its patches are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def samples(self, batch: Batch) -> Tensor | None:
        """Those with at least one word."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        return ids.new_tensor(len(ids)) if mask is None else mask.bool().any(1).sum()

    def words(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """All words: a text tower sees nothing else."""
        return batch["input_ids"], batch.get("attention_mask")

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """The frames' and the words' states, projected into the space that both towers share."""
        words = outputs.text_model_output.last_hidden_state
        text_tower = getattr(self.model, "text_model", None)
        words = _projected(words, self.model, "text_projection", getattr(text_tower, "head", None))
        return VideoTextStates(self._frames(outputs, len(words)), words, word_mask=batch.get("attention_mask"))

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


class BlockStates(StateSource):
    """Video tokens and text tokens of one sequence, as the blocks that READ adapts give them.

    Args:
        model: the adapted model; in an encoder-decoder model, the encoder's blocks are meant.
        which: `"last_block"`: the output of the last adapted block (the paper's figure); `"all_blocks"`: of every one,
            side by side in the batch; `"bottleneck"`: the last adapter's low-dimensional states.

    Raises:
        ValueError: if no block with text in it is adapted by READ.
    """

    def __init__(self, model: nn.Module, which: str) -> None:
        layers = _adapted_layers(model)
        if not layers:
            raise ValueError(
                f"PVLA's source of states {which!r} is the blocks that READ adapts, but no tower that reads text is "
                "adapted. Adapt one with `get_peft_model(model, ReadConfig(...))` before the Trainer is made, or give "
                "`pvla_states` a function that returns the states."
            )
        names = list(dict.fromkeys(_block_of(name) for name in layers))
        if which == "bottleneck":
            name, layer = list(layers.items())[-1]
            listened = {name: layer.activation[_active_adapters(layer)[0]]}
        else:
            listened = {name: model.get_submodule(name) for name in (names if which == "all_blocks" else names[-1:])}
        self.blocks = len(listened)
        self.placeholders = _placeholder_ids(model)
        self.outputs: dict[str, Tensor] = {}
        self._recording = self._with_grad = False
        for name, module in listened.items():
            module.register_forward_hook(partial(self._keep, name))  # which can be pickled with the model

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        # Some trainers run the model a second time, without gradient, for their metrics.
        if self._recording and (torch.is_grad_enabled() or not self._with_grad):
            self.outputs[name] = output if isinstance(output, Tensor) else output[0]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In this context the outputs of the blocks are kept."""
        self._recording, self._with_grad = True, torch.is_grad_enabled()
        try:
            yield
        finally:
            self._recording = False
            self.outputs.clear()

    def check(self, example: Batch) -> None:
        """Raise a `ValueError` if the batch has neither placeholder ids nor token masks."""
        self._masks(example)

    def samples(self, batch: Batch) -> Tensor | None:
        """Those with a video token and a text token, once for each block."""
        video, text = self._masks(batch)
        return self.blocks * (video.any(1) & text.any(1)).sum()

    def words(self, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
        """`input_ids` and the mask of the text tokens; None where the model puts text behind its ids."""
        ids = batch.get("input_ids")
        if ids is None:
            return None
        text = self._masks(batch)[1]  # longer than the ids where the model puts frames behind the words
        return None if text[:, ids.shape[1] :].any() else (ids, text[:, : ids.shape[1]])

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """The blocks' outputs at the video tokens and at the text tokens, one block after another in the batch."""
        masks = self._masks(batch)
        if len(self.outputs) < self.blocks:
            raise RuntimeError(
                "The model ran without the blocks whose states PVLA compares, or without a gradient in them: with "
                "gradient checkpointing, set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        for name, states in self.outputs.items():
            if states.shape[:2] != masks[0].shape:
                raise ValueError(
                    f"PVLA's token masks have shape {tuple(masks[0].shape)}, but {name} gives states of shape "
                    f"{tuple(states.shape)}: give `video_token_mask` and `text_token_mask` over the positions of the "
                    "sequence that the adapted blocks see."
                )
        video, words = (_gathered(list(self.outputs.values()), mask) for mask in masks)
        return VideoTextStates(video[0], words[0], video[1], words[1])

    def _masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`(batch, time)` bool: which positions are video, and which are text."""
        video, text = (batch.get(name) for name in TOKEN_MASKS)
        ids, valid = batch.get("input_ids"), batch.get("attention_mask")
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
        text = ~video if text is None else text.bool()
        if valid is not None and valid.shape == video.shape:
            video, text = video & valid.bool(), text & valid.bool()
        return video, text


def state_source(model: nn.Module, states: str | StateFunction) -> StateSource:
    """The source that a name or a function stands for.

    Args:
        model: the model that will be trained, adapted.
        states: one of `SOURCES`, or a function; `"auto"`: the towers of a dual encoder, else the last adapted block.

    Raises:
        ValueError: if the model has no such states.
    """
    if callable(states):
        return FunctionStates(states)
    if states not in SOURCES:
        raise ValueError(f"pvla_states={states!r}: expected a function or one of {', '.join(map(repr, SOURCES))}.")
    dual = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and _is_dual_encoder(m)), None)
    if states == "towers" and dual is None:
        raise ValueError(f"pvla_states='towers', but {type(model).__name__} is no dual encoder such as CLIP.")
    if dual is not None and states in ("auto", "towers"):
        return TowerStates(dual)
    return BlockStates(model, "last_block" if states == "auto" else states)


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


def _adapted_layers(model: nn.Module) -> dict[str, ReadLayer]:
    """READ's layers in towers that read text, without decoders that have an encoder beside them."""
    decoders: set[nn.Module] = set()
    for owner in model.modules():
        if isinstance(owner, PreTrainedModel) and getattr(owner.config, "is_encoder_decoder", False):
            encoder, decoder = owner.get_encoder(), owner.get_decoder()
            if decoder is not owner and decoder is not encoder:
                decoders.update(decoder.modules())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ReadLayer) and m not in decoders}
    return {
        name: layer for name, layer in layers.items() if _active_adapters(layer) and takes_text(owner_of(model, name))
    }


def _active_adapters(layer: ReadLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.read_downward]


def _block_of(name: str) -> str:
    """The block that a module lies in: up to the first number in its name."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name


def _placeholder_ids(model: nn.Module) -> list[int]:
    configs = [owner.config for owner in model.modules() if isinstance(owner, PreTrainedModel)]
    found = {getattr(config, name, None) for config in configs for name in PLACEHOLDERS}
    return sorted(token for token in found if isinstance(token, int))


def _gathered(states: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The masked positions moved to the front and the rest cut off: `(blocks * batch, longest, dim)` and their mask.

    Costs are all pairs of positions, so leaving the rest in would cost more than finding out how many there are.
    """
    longest = max(int(mask.sum(1).max()), 1)
    order = mask.logical_not().long().argsort(dim=1, stable=True)[:, :longest]
    gathered = torch.cat([x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in states])
    return gathered, mask.gather(1, order).repeat(len(states), 1)
