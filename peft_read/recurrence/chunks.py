"""Running a recurrence over chunks of time at once, to the result of running it over one step after another.

A recurrence that is as narrow as an adapter's forgets quickly. So the sequence is cut into chunks, and all of them run
at once, from guessed states; each hands its last state to its successor, and they run again, until nothing changes.
The result is that of the sequential scan, after few rounds that are each as long as one chunk. Where it takes more,
for a recurrence that doesn't forget, the chunks run one after another after all. A backward pass, a linear recurrence
in reverse time, goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor


CHUNK = 32
LONGEST_CHUNK = 128
MANY_ROWS = 512  # at once, from which on more of them gain nothing: then chunks are longer
MOST_ROUNDS = 4
Steps: TypeAlias = Sequence[tuple[Tensor, ...]]  # what each of some steps reads and writes
# Takes the states before the first of some steps, and those steps. It keeps its results and gives the states after
# the last step.
Run: TypeAlias = Callable[[Tensor, Steps], Tensor]


class Chunks:
    """How `(batch, time, ...)` is cut into rows `(length, count * batch, ...)`, a chunk's rows next to each other.

    Args:
        of: what is to be cut. Short sequences stay whole; the last chunk of others may be partly empty.
        width: of the states.
    """

    def __init__(self, of: Tensor, width: int) -> None:
        self.batch, self.time = batch, time = of.shape[0], of.shape[1]
        self.length = time
        # With fewer chunks the rounds take as many steps as there are; wide states fill a processor by themselves.
        if time >= CHUNK * max(4, width // 8):
            self.length = CHUNK
            while self.length < LONGEST_CHUNK and batch * time >= MANY_ROWS * self.length:
                self.length *= 2
        self.count = -(-time // self.length)
        indices = _indices if type(of) is Tensor else _indices.__wrapped__  # what tracers work with isn't to be kept
        self._source, self._place = indices(batch, time, self.length, self.count, of.device)

    def cut(self, x: Tensor) -> Tensor:
        """`(batch, time, features)` to `(length, count * batch, features)`; empty steps repeat the last one."""
        return x.flatten(0, 1).index_select(0, self._source).view(self.length, -1, x.shape[2])

    def cut_gradient(self, grad: Tensor) -> Tensor:
        """`cut` with zeros in the empty steps."""
        rows = self.cut(grad)
        if self.time % self.length:
            rows[self.time % self.length :, -self.batch :] = 0
        return rows

    def join(self, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`(length, count * batch, features)` back to `(batch, time, features)`, in the memory of `out` if it's given.

        Fresh memory is the dearer half of a copy on CPU.
        """
        if out is not None:
            out = out.flatten()[: self.batch * self.time * rows.shape[2]].view(-1, rows.shape[2])
        joined = torch.index_select(rows.flatten(0, 1), 0, self._place, out=out)
        return joined.view(self.batch, self.time, rows.shape[2])

    def settle(
        self, run: Run, tensors: Sequence[Tensor], start: Tensor, *, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run a recurrence until every chunk has started from what its predecessor ended with.

        Args:
            run: the recurrence.
            tensors: what its steps read and write, `(length, count * batch, ...)`.
            start: state before the first step (after the last one, backwards), `(batch, width)`.
            backwards: time runs backwards, and the chunks' predecessors are the later ones.

        Returns:
            The states that the chunks started from and those that they ended with, `(count * batch, width)` each.
        """
        order = -1 if backwards else 1

        def steps_of(rows: slice) -> Steps:
            return list(zip(*(tensor[:, rows].unbind() for tensor in tensors), strict=True))[::order]

        steps = steps_of(slice(None))
        if self.count == 1:
            return start, run(start, steps)
        first = (self.count - 1) * self.batch if backwards else 0
        starts = start.new_zeros(self.count * self.batch, start.shape[1])
        starts[first : first + self.batch] = start
        skipped = self.length - CHUNK  # a guess of the states needs no more steps than it is hoped to depend on
        for _ in range(MOST_ROUNDS):
            ends = run(starts, steps[skipped:])
            kept = ends[self.batch :] if backwards else ends[: -self.batch]
            handed = torch.cat([kept, start] if backwards else [start, kept])
            if not skipped and self._equal(handed, starts):
                return starts, ends
            starts, skipped = handed, 0
        for row in range(first, first + order * len(starts), order * self.batch):
            rows = slice(row, row + self.batch)
            starts[rows] = start
            ends[rows] = start = run(start, steps_of(rows))
        return starts, ends

    def _equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether two guesses differ by no more than a few roundings of a sequence's largest state."""
        difference, size = ((s.view(self.count, self.batch, -1).abs().amax((0, 2))) for s in (a - b, a))
        return bool((difference <= 4 * torch.finfo(a.dtype).eps * size).all())


@lru_cache(maxsize=8)
def _indices(batch: int, time: int, length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row of each step of the chunks where it comes from, and for each step where it has gone to."""
    sequences = torch.arange(batch, device=device)
    steps = torch.arange(length * count, device=device).view(count, length).t().clamp(max=time - 1)
    source = steps[..., None] + time * sequences
    times = torch.arange(time, device=device)
    place = (times % length * count + times // length) * batch + sequences[:, None]
    return source.flatten(), place.flatten()
