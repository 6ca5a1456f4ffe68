"""What a Trainer aligns in one run, and by which loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import PvlaArguments
from .contrast import same_states
from .gradient_share import GradientShare
from .loss import PvlaDetails, PvlaLoss
from .pairs import PairBatches
from .source import Batch, StateFunction, StateSource, VideoTextStates
from .states import state_source


MET = (
    "pvla_negatives=True needs states of which video and sentence haven't met, and {}. Where they have, each frame "
    "has seen its own sentence, and copying it into the frames tells it from all others: nothing is learnt about the "
    "video. {}"
)


def check_batch(size: int, processes: int, mend: str) -> None:
    """Raise a `ValueError` that says what mends it if a batch of this size on each process has no negatives."""
    if size * processes < 2:
        raise ValueError(f"pvla_negatives compares the samples of a batch, and a batch has one: {mend}.")


@dataclass
class EvaluatedBatch:
    """A batch on its way through evaluation.

    Attributes:
        masks: its token masks, which neither the model nor `generate` must see.
        task: its loss of the task, once that is known.
        details: likewise, what the alignment's loss found out about its samples.
    """

    masks: dict[str, Tensor]
    task: Tensor | None = None
    details: PvlaDetails | None = None

    def rows(self, samples: int, negatives: bool) -> Tensor:
        """Of each sample the task's loss, the alignment's, and how much the latter counts: `(samples, 3)`.

        Without negatives these are the batch's means. With them samples without others to be told from don't count.
        """
        assert self.task is not None
        assert self.details is not None
        if not negatives:
            means = [self.task.detach().float(), mean_distance(self.details).detach().float()]
            return torch.stack([*means, torch.ones_like(means[0])]).repeat(samples, 1)
        sides = []
        for side in (self.details.loss.detach().float(), self.details.compared.float()):
            of_each = len(side) % samples == 0  # else a function gives others than the batch's
            sides.append(side.view(-1, samples).sum(0) if of_each else side.sum().expand(samples) / samples)
        return torch.stack([self.task.detach().float().expand(samples), *sides], 1)


class Aligned(NamedTuple):
    """States, and what the loss found out about them."""

    states: VideoTextStates
    details: PvlaDetails


class Alignment:
    """Source of states, loss, weight and pairs of one run of a Trainer.

    Attributes:
        loss: the alignment loss.
        source: where states come from.
        share: what sets the weight, if it is measured.
        pairs: what is aligned in place of the labelled samples, if there are such pairs.
        samples_in_step: how many samples the running optimizer step aligns, on all devices; None: not known.
        starts_step: whether the next batch is the step's first.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PvlaArguments,
        states: str | StateFunction,
        pairs: PairBatches | None,
        processing: Any = None,
    ) -> None:
        args.check_pvla()
        self.args = args
        self.loss: PvlaLoss = args.pvla_loss()
        self.source: StateSource = state_source(
            model, states, words=args.pvla_words, pool_frames=args.pvla_pool_frames, processing=processing
        )
        self.share = None if args.pvla_gradient_share is None else GradientShare(args.pvla_gradient_share)
        self.pairs = pairs
        self.samples_in_step: Tensor | None = None
        self.starts_step = True
        self.checked_at = -1
        if self.loss.negatives and self.source.met:
            raise ValueError(
                MET.format(
                    f"pvla_states={states!r} gives those of blocks, in one sequence",
                    "Set pvla_states='inputs'.",
                )
            )

    @property
    def weight(self) -> float:
        """The alignment's weight beside the task's loss; 0 before the first measurement of a share."""
        return self.args.pvla_weight if self.share is None else self.share.weight or 0.0

    def align(self, states: VideoTextStates, batch: Batch) -> Aligned:
        """What the loss finds in the states of a batch, beside those of all other devices.

        Raises:
            ValueError: if there are negatives to compare with and the states have met, or the ids of words don't fit.
        """
        if self.loss.negatives and states.met:
            raise ValueError(
                MET.format(
                    "a function gives them here",
                    "If it takes them apart from each other, let it say so: VideoTextStates(..., met=False).",
                )
            )
        if not self.loss.negatives:
            return Aligned(states, self.loss.details(*states[:4]))
        tokens = self.source.words(batch)  # which tell equal sentences under dropout, too
        if states.word_ids is not None:
            given, words = tuple(states.word_ids.shape), tuple(states.words.shape[:2])
            if given != words:
                raise ValueError(f"word_ids has shape {given}; the words have {words}.")
            tokens = states.word_ids, states.word_mask
        return Aligned(states, self.loss.details(*states[:4], across_devices=True, tokens=tokens))

    def warn_of_twins(self, states: VideoTextStates, batch: Batch) -> None:
        """Warn where samples of the same text have words of other states, and count as each other's negatives."""
        ids = batch.get("input_ids")
        told = states.word_ids is not None or self.source.words(batch) is not None
        if not self.loss.negatives or told or ids is None or ids.ndim != 2 or len(ids) != len(states.words):
            return
        twins = (ids[:, None] == ids).all(-1).fill_diagonal_(False)
        if not twins.any():
            return
        words = states.words.float()
        mask = torch.ones_like(words[..., 0]) if states.word_mask is None else states.word_mask
        if (twins & ~same_states(words, mask, words, mask)).any():
            warnings.warn(
                "Samples with the same `input_ids` have words of different states, as behind dropout, and are each "
                "other's negatives. If they say the same, give the Trainer a function as `pvla_states` whose "
                "VideoTextStates have `word_ids`.",
                UserWarning,
                stacklevel=2,
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In this context a model is in evaluation mode; after it each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def mean_distance(details: PvlaDetails) -> Tensor:
    """Mean of the losses over the valid samples of a batch."""
    return details.loss.sum() / details.valid.sum().clamp(min=1)


def rng_kept(device: torch.device):  # type: ignore[no-untyped-def]
    """In this context random numbers may be drawn, which aren't missing after it."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda")
