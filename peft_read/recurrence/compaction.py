"""Valid steps moved to the front of their rows, so that a scan needs no mask, and its outputs moved back."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..tracing import is_tracing


class Compaction:
    """Where the valid steps of a padded batch go; whole rows of numbers move, by index.

    Args:
        mask: `(batch, time)`, bool, true where a step is valid.

    Attributes:
        padding: `(batch, time, 1)`, bool, true behind the valid steps once they have moved.
    """

    def __init__(self, mask: Tensor) -> None:
        # What a tracer or the capture of a CUDA graph makes isn't to be kept.
        keeps = mask.device.type == "cpu" and type(mask) is Tensor and not is_tracing()
        indices = _kept_indices if keeps else _indices
        steps, before, ends, starts, column = indices(mask.shape[0], mask.shape[1], mask.device)
        count = mask.cumsum(dim=1)  # of valid steps, each included
        last = count + before  # valid step, after the move
        self.padding = (column >= count[:, -1:])[..., None]
        # Before the first valid step an output is the initial state, which lies behind all outputs.
        self._output = torch.where(count > 0, last, starts).flatten()
        place = torch.where(mask, last, ends).flatten()  # padding is at the end of its row
        # It may hold anything, NaN too, of which gradients of zero would make NaN: a valid step stands in for it. The
        # first step at which a row's count is the largest of all counts is a valid one.
        valid = count.argmax()
        self._source = torch.where(self.padding.flatten(), valid, steps.scatter(0, place, steps))

    def front(self, x: Tensor) -> Tensor:
        """`x (batch, time, features)` with its valid steps first."""
        return x.flatten(0, 1).index_select(0, self._source).view_as(x)

    def back(self, outputs: Tensor, start: Tensor) -> Tensor:
        """The outputs `(batch, time, hidden)` where their steps were, repeated over padding.

        Args:
            outputs: for the moved steps.
            start: `(batch, hidden)`, the output before the first one.
        """
        states = torch.cat([outputs.flatten(0, 1), start])
        return states.index_select(0, self._output).view_as(outputs)


def _indices(batch: int, time: int, device: torch.device) -> tuple[Tensor, ...]:
    """All steps, `(batch * time,)`; those before each row, at its end, and of initial states; times, `(time,)`."""
    steps = torch.arange(batch * time, device=device)
    rows = steps.view(batch, time)
    starts = torch.arange(batch * time, batch * (time + 1), device=device)[:, None]
    return steps, rows[:, :1] - 1, rows[:, -1:], starts, torch.arange(time, device=device)


_kept_indices = lru_cache(maxsize=8)(_indices)
