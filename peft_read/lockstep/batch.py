"""What is in a batch that runs through several towers: which tokens are real, and at which second each of them is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .layouts import Layout, layout_of, step_centers, step_mask, token_mask


@dataclass
class TowerBatch:
    """What a tower's blocks aren't passed of the batch that they work on.

    Args:
        modality: `"vision"`, `"audio"` or `"text"`.
        tower: the tower.
        size: number of samples.
        layout: of its hidden states in this batch.
        mask: `(batch, input steps)`, bool, true where the tower's input is real; `(batch, segments, input steps)` of
            sound in segments; None where all of it is real.
        times: in seconds, on one clock for all towers. Of vision `(batch, frames, 2)`: from when to when each frame is
            shown, or stands for what was left out around it. Of audio `(batch, segments, 2)`: when the first input
            step of a segment begins, and how long a step lasts. None where it isn't known.
        segments: how many rows of the tower's input each sample has, one after the other in time; of sound only.
        steps: steps of the tower's input in each row.
    """

    modality: str
    tower: nn.Module
    size: int
    layout: Layout
    mask: Tensor | None = None
    times: Tensor | None = None
    segments: int = 1
    steps: int = 0
    _masks: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        modality: str,
        tower: nn.Module,
        size: int,
        steps: int,
        mask: Tensor | None = None,
        times: Tensor | None = None,
        segments: int = 1,
    ) -> TowerBatch:
        """Describe a tower's input.

        Args:
            modality: `"vision"`, `"audio"` or `"text"`.
            tower: the tower.
            size: number of samples.
            steps: steps of the tower's input, padding included; of sound in segments those of one segment.
            mask: `(batch, input steps)`, true or not 0 where real; None where all of it is. Of sound in segments
                `(batch, segments, input steps)`.
            times: seconds, so that towers meet at the same time: of vision `(batch, frames, 2)`, from when to when
                each frame is shown; of audio `(batch, 2)`, when the first input step begins and how long a step lasts,
                or `(batch, segments, 2)`. Without them a clip's pictures and sound are taken to begin and to end
                together.
            segments: rows of the tower's input that follow each other in time for each sample: sound that is longer
                than its tower hears goes in as `(batch * segments, ...)`.

        Raises:
            ValueError: if the mask or the times have another shape, or the tower can't take such an input.
        """
        rows = (size, segments) if segments > 1 or (mask is not None and mask.ndim == 3) else (size,)
        if segments > 1 and modality != "audio":
            raise ValueError(f"Only sound can be given in segments, got {segments} segments of {modality}.")
        if mask is not None and mask.shape != (*rows, steps):
            raise ValueError(
                f"The mask of the {modality} tower has the shape {tuple(mask.shape)}, expected {(*rows, steps)}: it "
                "goes over the steps of the tower's own input."
            )
        if times is not None:
            if times.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"The times of the {modality} tower came as {times.dtype}, which is too coarse for seconds: keep "
                    "them in float32. DeepSpeed's Trainer casts all inputs; leave the times out there."
                )
            times = times.float()
            if modality == "audio" and segments == 1 and times.ndim == 2:
                times = times[:, None]
            expected = {"vision": (size, steps, 2), "audio": (size, segments, 2)}.get(modality)
            if times.shape != expected:
                raise ValueError(
                    f"The times of the {modality} tower have the shape {tuple(times.shape)}, expected {expected}: "
                    + (
                        "from when to when each frame is shown, in seconds."
                        if modality == "vision"
                        else "the second at which the first step begins, and how long a step lasts."
                    )
                )
        layout = layout_of(tower, modality, steps)
        return cls(modality, tower, size, layout, None if mask is None else mask.bool(), times, segments, steps)

    def split(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(batch, steps, tokens of a step, dim)` of the tokens in time and `(batch, tokens, dim)` of the others."""
        if self.segments == 1:
            return self.layout.split(hidden, self.size)
        parts = self.layout.split(hidden, self.size * self.segments)
        timed, untimed = (None if part is None else self._joined(part) for part in parts)
        return timed, untimed

    def join(self, timed: Tensor | None, untimed: Tensor | None, shape: torch.Size) -> Tensor:
        """The inverse of `split`."""
        if self.segments > 1:
            parts = (timed, untimed)
            timed, untimed = (None if x is None else x.unflatten(1, (self.segments, -1)).flatten(0, 1) for x in parts)
        return self.layout.join(timed, untimed, shape)

    def _joined(self, rows: Tensor) -> Tensor:
        """`(batch * segments, n, ...)` to `(batch, segments * n, ...)`."""
        return rows.unflatten(0, (self.size, self.segments)).flatten(1, 2)

    def masks(self, timed: Tensor | None, untimed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which of what `split` gave is real.

        Tokens that aren't in time, but of a modality that is, have seen everything: those before the tokens in time
        count as real where no step of their row is padding; where there are no others, where any step is real.

        Returns:
            `(batch, steps)` of the tokens in time and `(batch, tokens)` of the others, bool, true where real; None
            where all is, or where there are no such tokens.
        """
        if self.mask is None:
            return None, None
        shape = (0 if timed is None else timed.shape[1], 0 if untimed is None else untimed.shape[1])
        if shape not in self._masks:
            mask = self.mask.reshape(self.size * self.segments, -1)
            steps, tokens = (count // self.segments for count in shape)
            masks = (
                None if timed is None else step_mask(self.tower, mask, steps),
                None if untimed is None else self._untimed_mask(mask, tokens),
            )
            timed_mask, untimed_mask = (None if each is None else self._joined(each) for each in masks)
            self._masks[shape] = timed_mask, untimed_mask
        return self._masks[shape]

    def _untimed_mask(self, mask: Tensor, tokens: int) -> Tensor:
        if self.layout.order == "words":
            return token_mask(mask, tokens)
        real = mask.any(1) if self.layout.order == "none" else mask.all(1)
        return real[:, None].expand(-1, tokens)

    def step_times(self, steps: int) -> Tensor | None:
        """From when to when each time step of the tokens is, `(batch, steps, 2)` in seconds; None if it isn't known.

        Args:
            steps: time steps of the tokens, of all segments together.
        """
        if self.times is None or not steps:
            return None
        if self.modality == "vision":
            return self._frame_times(self.times, steps)
        centers, apart = step_centers(self.tower, self.steps, steps // self.segments)
        centers = centers.to(self.times)
        first, length = self.times[..., :1], self.times[..., 1:]
        middle, half = (
            (first + centers * length).flatten(1),
            (length * apart / 2).expand(-1, -1, len(centers)).flatten(1),
        )
        return torch.stack([middle - half, middle + half], -1)

    def _frame_times(self, times: Tensor, steps: int) -> Tensor:
        """From when to when the frames of each step are shown: towers may join several."""
        each = times.shape[1] // steps
        if each == 1:
            return times
        grouped = times[:, : each * steps].unflatten(1, (steps, each))
        if self.mask is None:
            return torch.stack([grouped[..., 0].amin(2), grouped[..., 1].amax(2)], -1)
        padding = ~self.mask[:, : each * steps].unflatten(1, (steps, each))
        starts = grouped[..., 0].masked_fill(padding, torch.inf).amin(2)
        ends = grouped[..., 1].masked_fill(padding, -torch.inf).amax(2)
        nothing = padding.all(2)
        return torch.stack([starts.masked_fill(nothing, 0.0), ends.masked_fill(nothing, 0.0)], -1)


@dataclass
class LockstepBatch:
    """A batch on its way through the towers of a composite model; made anew for each forward.

    Args:
        size: number of samples.
        towers: by name, those that take part: a modality may be absent.

    Attributes:
        importance: by modality, how much each time step counts, `(batch, steps)` in [0, 1], where an exchange judged
            it: left there for whoever pools the towers' outputs, with its gradient.
    """

    size: int
    towers: dict[str, TowerBatch]
    importance: dict[str, Tensor] = field(default_factory=dict)
