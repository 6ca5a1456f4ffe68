"""States of models that read video and text as one sequence: what the sources of such states share."""

from __future__ import annotations

import inspect
import logging
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..architectures.targets import owner_of, takes_text
from ..read.layer import ReadLayer
from .frames import frame_numbers, pooled_by_frame
from .source import Batch, StateSource, VideoTextStates, masks_taken, without_token_masks
from .tokens import TokenMasks, gathered


logger = logging.getLogger(__name__)


class SequenceStates(StateSource):
    """Video tokens and text tokens of the sequence that the first tower which READ adapts is given.

    A tower is a transformers model inside the model, such as the language model of a vision-language model, the
    encoder of an encoder-decoder model, or the whole of a text encoder.

    Args:
        model: the adapted model.
        which: the name of the source, for messages.

    Raises:
        ValueError: if no tower that reads text is adapted by READ.
    """

    reads_outputs = False

    def __init__(self, model: nn.Module, which: str) -> None:
        self.layers = _adapted_layers(model)
        if not self.layers:
            raise ValueError(
                f"PVLA's source of states {which!r} is the blocks that READ adapts, but no tower that reads text is "
                "adapted. Adapt one with `get_peft_model(model, ReadConfig(...))` before the Trainer is made, or give "
                "`pvla_states` a function that returns the states."
            )
        self.tower = owner_of(model, next(iter(self.layers)))
        self.masks = TokenMasks(model)
        self.pools_frames = False
        self.recorded: dict[str, Tensor] = {}
        self.embeddings = _embeddings(self.tower)
        self._looked_up: Tensor | None = None  # what the embeddings gave last
        self._ids_lead: bool | None = None  # whether sequences longer than `input_ids` begin with them, once seen
        self._with_grad = False
        self._stops = False  # whether the forward ends once all has been recorded

    def listen(self) -> list[RemovableHandle]:
        """Put hooks on the model that record."""
        return [] if self.embeddings is None else [self.embeddings.register_forward_hook(self._embed)]

    def _embed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.counts():
            self._looked_up = output

    @abstractmethod
    def entered(self) -> Tensor | None:
        """The sequence that the tower was given, if it is known."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are on the model in this context only, and what they recorded is dropped at its end."""
        self._with_grad = torch.is_grad_enabled()
        handles = self.listen()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.recorded.clear()
            self._looked_up = None

    def run(self, model: nn.Module, batch: Batch) -> None:
        """Run the model until all that is wanted has been recorded: no further block, no head."""
        self._stops = True
        try:
            with suppress(Stopped):
                model(**without_token_masks(batch, masks_taken(model)))
        finally:
            self._stops = False

    def counts(self) -> bool:
        """Whether the running forward is to be recorded: some trainers run a second one, without gradient."""
        return torch.is_grad_enabled() or not self._with_grad

    def check(self, example: Batch, model: nn.Module) -> None:
        """Raise a `ValueError` if the token masks of `example` don't fit, and log what they tell."""
        logger.info(self.masks.describe(example))
        if self.pools_frames:
            frame_numbers(self.masks(example)[0], example)

    def samples(self, batch: Batch) -> Tensor | None:
        """Samples with video and text, once for each block."""
        video, text = self.masks(batch)
        return self.blocks * (video.any(1) & (text > 0).any(1)).sum()

    def words(self, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
        """The words among `input_ids`; None if text lies elsewhere, too, or it isn't known where."""
        ids = batch.get("input_ids")
        if ids is None:
            return None
        video, text = self.masks(batch)
        if ids.shape != text.shape:  # else the model has to put frames behind the words, and nothing before them
            length = ids.shape[-1]
            if ids.ndim != 2 or text.shape[1] < length or video[:, :length].any() or text[:, length:].any():
                return None
            if self._ids_lead is False:
                return None
        return ids, text[:, : ids.shape[1]]

    def _see_where_ids_are(self) -> None:
        """Find out, once, whether the words' embeddings begin a longer sequence or lie behind something."""
        entered, looked_up = self.entered(), self._looked_up
        if self._ids_lead is not None or entered is None or looked_up is None or looked_up.ndim != entered.ndim:
            return
        length, behind = looked_up.shape[1], entered.shape[1] - looked_up.shape[1]
        if len(looked_up) == len(entered) and behind > 0:
            places = (entered[:, k : k + length] for k in range(behind + 1))
            found = [torch.equal(place, looked_up.to(entered.dtype)) for place in places]
            self._ids_lead = found[0] or not any(found)  # where words are changed on their way, nothing tells

    def in_sequence(self, batch: Batch, met: bool) -> VideoTextStates:
        """What was recorded, as states of video and of words.

        Raises:
            RuntimeError: if not all was recorded.
            ValueError: if the batch's masks don't fit it.
        """
        masks = self.masks(batch)
        if len(self.recorded) < self.blocks:
            raise RuntimeError(
                "The model ran without the blocks whose states PVLA compares, or without a gradient in them: with "
                "gradient checkpointing, set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        for name, states in self.recorded.items():
            if states.shape[:2] != masks[0].shape:
                raise ValueError(
                    f"PVLA's token masks have shape {tuple(masks[0].shape)}, but {name} gives states of shape "
                    f"{tuple(states.shape)}: give `video_token_mask` and `text_token_mask` over the positions of the "
                    "sequence that the adapted blocks see."
                )
        self._see_where_ids_are()
        recorded = list(self.recorded.values())
        words, word_mask = gathered(recorded, masks[1])
        if self.pools_frames:
            video, frame_mask = pooled_by_frame(recorded, frame_numbers(masks[0], batch))
        else:
            video, frame_mask = gathered(recorded, masks[0])
        return VideoTextStates(video, words, frame_mask, word_mask, met)


class Stopped(Exception):  # noqa: N818  (no error)
    """Ends a forward of which all that is wanted has been recorded."""


def arguments_by_name(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """A call's arguments by their names."""
    names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def carries_states(name: str, value: Any) -> bool:
    """Whether an argument of a tower may hold a sample's video beside the embeddings: a cache, features of layers."""
    if "mask" in name or "position" in name or name == "labels":
        return False
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(hasattr(x, "get_seq_length") or (isinstance(x, Tensor) and x.is_floating_point()) for x in parts)


def _embeddings(tower: nn.Module) -> nn.Module | None:
    try:
        return tower.get_input_embeddings() if isinstance(tower, PreTrainedModel) else None
    except NotImplementedError:
        return None


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
        name: layer for name, layer in layers.items() if active_adapters(layer) and takes_text(owner_of(model, name))
    }


def active_adapters(layer: ReadLayer) -> list[str]:
    """Names of the layer's own adapters that act."""
    return [name for name in layer.active_adapters if name in layer.read_downward]


def block_of(name: str) -> str:
    """The block that a module lies in: up to the first number in its name."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name
