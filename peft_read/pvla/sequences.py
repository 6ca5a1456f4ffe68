"""States of models that read video and text as one sequence: as it enters the blocks, and as blocks give it."""

from __future__ import annotations

import inspect
import logging
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..architectures.targets import owner_of, takes_text
from ..read.layer import ReadLayer
from .contrast import sentence_keys
from .frames import frame_numbers, pooled_by_frame
from .source import Batch, StateSource, VideoTextStates, masks_taken, without_token_masks
from .tokens import TokenMasks, gathered
from .trained import modules_that_project, reaches_trained


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
        self._ids_lead: bool | None = None  # whether longer sequences begin with `input_ids`; None: not seen yet
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
            with suppress(_Stopped):
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
            if self._ids_lead is None:
                entered, looked_up = self.entered(), self._looked_up
                if entered is None or looked_up is None or looked_up.shape[:2] != ids.shape:
                    return None
                self._ids_lead = torch.equal(entered[:, :length], looked_up.to(entered.dtype))
            if not self._ids_lead:
                return None
        return ids, text[:, : ids.shape[1]]

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
        recorded = list(self.recorded.values())
        words, word_mask = gathered(recorded, masks[1])
        if self.pools_frames:
            video, frame_mask = pooled_by_frame(recorded, frame_numbers(masks[0], batch))
        else:
            video, frame_mask = gathered(recorded, masks[0])
        return VideoTextStates(video, words, frame_mask, word_mask, met)


class BlockStates(SequenceStates):
    """The tokens as the blocks that READ adapts give them, where each has seen all others.

    Args:
        model: the adapted model; in an encoder-decoder model, the encoder's blocks are meant.
        which: `"last_block"`: the output of the last adapted block (the paper's figure); `"all_blocks"`: of every one,
            side by side in the batch; `"bottleneck"`: the last adapter's low-dimensional states.

    Raises:
        ValueError: if no block with text in it is adapted by READ.
    """

    met = True

    def __init__(self, model: nn.Module, which: str) -> None:
        super().__init__(model, which)
        names = list(dict.fromkeys(_block_of(name) for name in self.layers))
        if which == "bottleneck":
            name, layer = list(self.layers.items())[-1]
            self.listened = {name: layer.activation[_active_adapters(layer)[0]]}
        else:
            self.listened = {
                name: model.get_submodule(name) for name in (names if which == "all_blocks" else names[-1:])
            }
        self.blocks = len(self.listened)
        self._call: dict[str, Any] = {}  # what the tower was given

    def listen(self) -> list[RemovableHandle]:
        """Record what the listened modules return, and what the tower is given."""
        handles = super().listen()
        handles += [m.register_forward_hook(partial(self._keep_output, n)) for n, m in self.listened.items()]
        handles.append(self.tower.register_forward_pre_hook(self._keep_call, with_kwargs=True))
        return [*handles, self.tower.register_forward_hook(self._leave)]

    def _keep_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.counts():
            self.recorded[name] = output if isinstance(output, Tensor) else output[0]

    def _keep_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.counts():
            self._call = arguments_by_name(module, args, kwargs)

    def entered(self) -> Tensor | None:
        """Embeddings that the tower was called with."""
        return self._call.get("inputs_embeds")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stops:  # before heads
            raise _Stopped

    @contextmanager
    def recording(self) -> Iterator[None]:
        """As of the parent; the tower's arguments are dropped, too."""
        try:
            with super().recording():
                yield
        finally:
            self._call = {}

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """Video and words of each recorded block, which have met."""
        return self.in_sequence(batch, met=True)

    def mismatched(self, states: VideoTextStates, batch: Batch) -> VideoTextStates | None:
        """Sentences beside other samples' videos, read anew by the tower: block states carry their own video along.

        A sample gets the video tokens of the next one with as many of them, at the places of its own; samples without
        such a partner, or with one of the same words, have no valid frame. None if the tower can't be called with
        embeddings, or is given more than them that is a sample's own.
        """
        call = dict(self._call)
        ids, embedded = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        takes_embeddings = "inputs_embeds" in inspect.signature(type(self.tower).forward).parameters
        if not takes_embeddings or any(_carries_states(name, value) for name, value in call.items()):
            return None
        if embedded is None:
            if ids is None or self.embeddings is None:
                return None
            embedded = self.embeddings(ids)
        video, _ = self.masks(batch)
        words = self.words(batch)
        sentences = range(len(video)) if words is None else map(tuple, sentence_keys(*words).tolist())
        partners = _next_with_as_many(video.sum(1).tolist(), list(sentences))
        mixed = embedded.clone()
        for own, other in enumerate(partners):
            if other is not None:
                mixed[own, video[own]] = embedded[other, video[other]]
        own_recorded, with_grad = dict(self.recorded), self._with_grad
        self._with_grad = False
        try:
            self.tower(inputs_embeds=mixed, **call)
            found = self.in_sequence(batch, met=True)
        finally:
            self.recorded, self._with_grad = own_recorded, with_grad
        has_partner = torch.tensor([other is not None for other in partners], device=video.device)
        assert found.frame_mask is not None
        return found._replace(frame_mask=found.frame_mask & has_partner.repeat(self.blocks)[:, None])


class InputStates(SequenceStates):
    """The tokens as they enter the first tower that READ adapts, before any of its blocks: they haven't met yet.

    Projected video tokens against the embeddings of words. Where the tower itself puts the video among the words, as
    Kosmos-2 does, they are what enters its first block.

    Args:
        model: the adapted model.

    Raises:
        ValueError: if no tower that reads text is adapted by READ.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "inputs")
        self.model = model
        self.first_block = _first_of_its_row(model, _block_of(next(iter(self.layers))))
        self._inside = False  # the tower, which was given ids
        self._features = False  # whether the tower was given features, too

    def listen(self) -> list[RemovableHandle]:
        """Record what enters the first block, whether that was given or looked up."""
        self._inside = False
        return [
            *super().listen(),
            self.tower.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.first_block.register_forward_pre_hook(self._enter_block, with_kwargs=True),
        ]

    def entered(self) -> Tensor | None:
        """What was recorded."""
        return next(iter(self.recorded.values()), None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = arguments_by_name(module, args, kwargs)
        given = call.get("inputs_embeds")
        self._inside = given is None
        self._features = any(_carries_states(name, value) for name, value in call.items() if name != "labels")
        if given is not None:
            self._keep_input(given)

    def _embed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        super()._embed(module, args, output)
        # Else these are the embeddings of words alone, before video tokens take their places.
        if self._inside and not self._features:
            self._inside = False
            self._keep_input(output)

    def _enter_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A tower that has no module for embeddings, or puts features among them.
        if self._inside:
            self._inside = False
            self._keep_input(args[0] if args else next(iter(kwargs.values())))

    def _keep_input(self, states: Tensor) -> None:
        if self.counts():
            self.recorded["the input of the blocks"] = states
        if self._stops:
            raise _Stopped

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """Video and words before they met."""
        return self.in_sequence(batch, met=False)

    def check(self, example: Batch, model: nn.Module) -> None:
        """Raise a `ValueError` if the masks don't fit, or nothing before the blocks is trained."""
        super().check(example, model)
        try:
            with torch.enable_grad(), self.recording():
                self.run(model, example)
                states = self.states(model, example, None)
        except Exception:  # what training itself will stumble over
            return
        if not (reaches_trained(states.video) or reaches_trained(states.words)):
            raise ValueError(self.untrained())

    def untrained(self) -> str:
        """Why there is no gradient, and what to train."""
        width = None if self.embeddings is None else getattr(self.embeddings, "embedding_dim", None)
        names = modules_that_project(self.model, self.tower, width)
        named = f"modules_to_save={names}" if names else "the names of what makes the video tokens as modules_to_save"
        return (
            f"pvla_states='inputs' aligns video tokens with words as they enter {type(self.tower).__name__}, but "
            "nothing that comes before is trained. Train what projects the video into the space of words: give "
            f"ReadConfig {named}."
        )


class _Stopped(Exception):  # noqa: N818  (no error)
    """Ends a forward of which all that is wanted has been recorded."""


def arguments_by_name(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """A call's arguments by their names."""
    names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def _carries_states(name: str, value: Any) -> bool:
    """Whether an argument of a tower may hold a sample's video beside the embeddings: a cache, features of layers."""
    if "mask" in name or "position" in name:
        return False
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(hasattr(x, "get_seq_length") or (isinstance(x, Tensor) and x.is_floating_point()) for x in parts)


def _next_with_as_many(counts: list[int], sentences: list[Any]) -> list[int | None]:
    """For each sample the next one, in a circle, of another sentence with as many video tokens, if it has any."""
    rows = range(len(counts))
    orders = [[*rows[row + 1 :], *rows[:row]] for row in rows]
    return [
        next((i for i in order if counts[i] == counts[row] > 0 and sentences[i] != sentences[row]), None)
        for row, order in zip(rows, orders, strict=True)
    ]


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
        name: layer for name, layer in layers.items() if _active_adapters(layer) and takes_text(owner_of(model, name))
    }


def _active_adapters(layer: ReadLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.read_downward]


def _first_of_its_row(model: nn.Module, block: str) -> nn.Module:
    """The first of the blocks of which this is one: adapters may begin at a later one."""
    row, _, number = block.rpartition(".")
    return model.get_submodule(f"{row}.0" if number.isdigit() else block)


def _block_of(name: str) -> str:
    """The block that a module lies in: up to the first number in its name."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name
