"""What a source of states is: it listens to a model and gives the states of videos and of sentences."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from .contrast import sentence_keys


BLOCK_SOURCES = ("last_block", "all_blocks", "bottleneck")
SOURCES = ("auto", *BLOCK_SOURCES, "inputs", "towers")
# Columns of a batch that say which positions of the model's sequence are video and which are text.
TOKEN_MASKS = ("video_token_mask", "text_token_mask")

Batch: TypeAlias = Mapping[str, Any]


class VideoTextStates(NamedTuple):
    """States that PVLA compares.

    Attributes:
        video: `(batch, frames, dim)`.
        words: `(batch, words, dim)`.
        frame_mask: `(batch, frames)`, true where a frame is valid; None: all are.
        word_mask: `(batch, words)`, which words count, as a mask or as weights, see [`PvlaLoss`]; None: all do.
        met: whether frames and words may have seen each other, as they have in the blocks of one sequence. Then other
            samples' words are no test of what was learnt: they carry their own video along.
        word_ids: `(batch, words)`, ids by which sentences that say the same are told, and aren't each other's
            negatives; None: the states tell them, which dropout makes different.
    """

    video: Tensor
    words: Tensor
    frame_mask: Tensor | None = None
    word_mask: Tensor | None = None
    met: bool = True
    word_ids: Tensor | None = None


StateFunction: TypeAlias = Callable[[nn.Module, Batch, Any], VideoTextStates]


class StateSource(ABC):
    """Gives the states of a batch that has just run through the model.

    Attributes:
        blocks: how many states it gives of each sample, those of one block after those of another.
        reads_outputs: whether `states` looks at what the model returned.
        met: whether frames and words have seen each other in these states; None: that isn't known before they come.
    """

    blocks = 1
    reads_outputs = True
    met: bool | None = False

    @abstractmethod
    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """The states of the last forward inside of `recording`.

        Args:
            model: as the Trainer calls it.
            batch: what the model was given, with the token masks where there are some.
            outputs: what it returned; None if the source doesn't read it.
        """

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Run a batch that has no task, as far as its states need; called inside of `recording`.

        Args:
            model: not wrapped for several devices.
            batch: as of `states`.

        Returns:
            The outputs that `states` takes.
        """
        return model(**without_token_masks(batch, masks_taken(model)))

    def mismatched(self, states: VideoTextStates, batch: Batch) -> VideoTextStates | None:
        """Videos beside words of other samples, if such states can be had; called inside of `recording`.

        Where the other sample says the same, no word counts.

        Args:
            states: what `states` gave for the batch.
            batch: likewise.
        """
        if states.met or len(states.words) < 2:
            return None
        own, counts = states.words, states.word_mask
        counts = torch.ones_like(own[..., 0], dtype=torch.bool) if counts is None else counts
        words, mask = own.roll(1, 0), counts.roll(1, 0)
        tokens = self.words(batch) if states.word_ids is None else (states.word_ids, counts)
        if tokens is None:
            alike = torch.isclose(own, words, rtol=1e-4, atol=1e-6).all(-1) | (counts == 0)
            same = (alike & (counts == mask)).all(1)
        else:
            keys = sentence_keys(*tokens)
            same = (keys == keys.roll(1, 0)).all(1)
        return states._replace(words=words, word_mask=mask * ~same[:, None])

    def samples(self, batch: Batch) -> Tensor | None:
        """How many samples `states` will have with something to align; None where that isn't known before it runs."""
        return None

    def words(self, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
        """`input_ids` and which of them are the words of `states`, `(batch, time)`; None where that isn't known."""
        return None

    def check(self, example: Batch, model: nn.Module) -> None:
        """Raise a `ValueError` if a batch like this one doesn't tell what is video and what is text.

        Args:
            example: a batch on the model's device.
            model: in evaluation mode, not wrapped for several devices.
        """
        return

    def untrained(self) -> str:
        """Why there may be no gradient in the states."""
        return "PVLA's states carry no gradient: no adapter that is trained comes before them."

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In this context the model's forwards are listened to."""
        yield


class FunctionStates(StateSource):
    """States by a function of the user's: `function(model, batch, outputs)`."""

    met = None

    def __init__(self, function: StateFunction) -> None:
        self.function = function

    def states(self, model: nn.Module, batch: Batch, outputs: Any) -> VideoTextStates:
        """What the function returns."""
        return self.function(model, batch, outputs)


def masks_taken(model: nn.Module) -> tuple[str, ...]:
    """The token masks that the forward of a model, or of the base of an adapted one, names."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return _masks_named(type(base).forward)


@cache  # asked in every step
def _masks_named(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in TOKEN_MASKS if name in inspect.signature(forward).parameters)


def without_token_masks(batch: Batch, taken: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a model takes of a batch: all but the columns that only PVLA reads.

    Args:
        batch: what the collator gives.
        taken: masks that the model takes as well.
    """
    return {name: value for name, value in batch.items() if name not in TOKEN_MASKS or name in taken}


def check_token_mask(name: str, mask: Tensor) -> None:
    """Raise a `ValueError` if a mask of `TOKEN_MASKS` has values that it can't have.

    Those of video are 0 or 1. So are those of text, or floating-point weights of 0 or more.
    """
    if mask.is_floating_point() and name == TOKEN_MASKS[1]:
        if not ((mask >= 0) & mask.isfinite()).all():
            raise ValueError(f"{name!r} has negative, infinite or NaN weights; expected 0 or more for each token.")
    elif mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        weights = " Weights of words are floating-point numbers." if name == TOKEN_MASKS[1] else ""
        raise ValueError(f"{name!r} has values other than 0 and 1; expected these alone, 0 in padding.{weights}")


def token_masks(batch: Batch) -> dict[str, Tensor]:
    """The columns of a batch that only PVLA reads."""
    return {name: batch[name] for name in TOKEN_MASKS if name in batch}
