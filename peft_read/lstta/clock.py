"""Where the steps of pictures and sound lie: among the valid ones of their clip, and on one clock in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


SHORTEST = 1e-6  # seconds that are taken for none
# Seconds by which sound may go on beside the pictures and still belong to their first or last frame: encoders fill up
# their last block, and put some silence before the first.
BLOCK = 0.15


@dataclass(frozen=True)
class Extent:
    """The valid part of each clip, from the first valid step to the last; steps between may be masked."""

    valid: Tensor  # (rows, steps)
    offset: Tensor  # (rows, steps), steps since the first valid one
    length: Tensor  # (rows, 1)

    @classmethod
    def of(cls, valid: Tensor) -> Extent:
        """The extent of `valid (rows, steps)`."""
        index = torch.arange(valid.shape[1], device=valid.device)
        first = torch.where(valid, index, valid.shape[1]).amin(1, keepdim=True)
        last = torch.where(valid, index, -1).amax(1, keepdim=True)
        return cls(valid, (index - first).clamp(min=0), (last - first + 1).clamp(min=0))

    @property
    def position(self) -> Tensor:
        """`(rows, steps)`, the place of each step, 0 where the first valid one begins and 1 where the last ends."""
        return (self.offset + 0.5) / self.length.clamp(min=1)


@dataclass(frozen=True)
class Clock:
    """Pictures and sound on one clock; all in seconds.

    Attributes:
        starts: `(rows, frames)`, when each frame is first shown, rising; padding repeats the frame before it.
        seen: `(rows, frames)`, the middle of each valid frame's time, minus infinity for padding.
        shown: `(rows, frames)`, the valid frame that is shown from then on, -1 before the first one.
        begin: `(rows, 1)`, when the pictures begin.
        end: `(rows, 1)`, when they end.
        middles: `(rows, steps)`, the middle of each step of the sound.
        lengths: `(rows, steps)`, how long each step of the sound is.
    """

    starts: Tensor
    seen: Tensor
    shown: Tensor
    begin: Tensor
    end: Tensor
    middles: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, frames: Tensor, vision: Extent, sound: Tensor, audio: Extent) -> Clock:
        """The clock of frames `(rows, frames, 2)` and sound `(rows, steps, 2)`, from when to when, in seconds."""
        starts = torch.where(vision.valid, frames[..., 0], -torch.inf).cummax(1).values
        index = torch.arange(frames.shape[1], device=frames.device)
        shown = torch.where(vision.valid, index, -1).cummax(1).values
        begin = torch.where(vision.valid, frames[..., 0], torch.inf).amin(1, keepdim=True)
        end = torch.where(vision.valid, frames[..., 1], -torch.inf).amax(1, keepdim=True)
        middles = torch.where(audio.valid, sound.mean(-1), 0.0)
        seen = torch.where(vision.valid, frames.mean(-1), -torch.inf)
        lengths = torch.where(audio.valid, sound[..., 1] - sound[..., 0], 0.0)
        return cls(starts, seen, shown, begin, end, middles, lengths)

    def place(self, vision: Extent, window: int, frame_windows: int, others: int) -> tuple[Tensor, Tensor]:
        """The window of each step of the sound, `(rows, steps)`, and its time in it, in frames."""
        last = torch.searchsorted(self.starts, self.middles.contiguous(), right=True) - 1
        frame = self.shown.gather(1, last.clamp(min=0)).clamp(min=0)
        offset = vision.offset.gather(1, frame)
        within = offset // window, (offset % window).float()
        # Sound without pictures: what comes before the first frame, and what comes after the last.
        first, final = self._sound_extent()
        for beside, base, start, stop in (
            (self.middles >= self.end + BLOCK, frame_windows, self.end, final),
            (self.middles < self.begin - BLOCK, frame_windows + others, first, self.begin),
        ):
            seconds = (stop - start).clamp(min=SHORTEST)
            windows = (seconds / (window * self._of_frame())).ceil().clamp(1, others)
            share = ((self.middles - start) / seconds).clamp(0, 1 - 1e-6) * windows
            share = torch.where(beside, share, 0.0)  # rows without frames have infinite ends
            within = (
                torch.where(beside, base + share.long(), within[0]),
                torch.where(beside, share.frac() * window, within[1]),
            )
        return within

    def _sound_extent(self) -> tuple[Tensor, Tensor]:
        """`(rows, 1)` each, when the sound begins and ends."""
        real, half = self.lengths > 0, self.lengths / 2
        first = torch.where(real, self.middles - half, torch.inf).amin(1, keepdim=True)
        return first, torch.where(real, self.middles + half, -torch.inf).amax(1, keepdim=True)

    def positions(self, framed: Tensor, heard: Tensor) -> dict[str, Tensor]:
        """By tower, where each step lies between the beginning of the pictures (0) and their end (1).

        Args:
            framed: `(rows, frames)` bool, which frames are valid.
            heard: `(rows, steps)` bool, which steps of the sound are.
        """
        length = (self.end - self.begin).clamp(min=SHORTEST)
        places = {"vision": (self.seen, framed), "audio": (self.middles, heard)}
        return {m: ((x - self.begin) / length).masked_fill(~valid, 0.0) for m, (x, valid) in places.items()}

    def outside(self, windows: Tensor, heard: Tensor, bins: int) -> Tensor:
        """Of the windows without frames, how many frames would last as long as their sound: `(rows, bins)`.

        Args:
            windows: `(rows, steps)`, the window of each step of the sound.
            heard: `(rows, steps)` bool, which steps are valid.
            bins: number of windows.
        """
        beside = (self.middles < self.begin - BLOCK) | (self.middles >= self.end + BLOCK)
        without = heard & beside & self.begin.isfinite()
        seconds = torch.where(without, self.lengths, 0.0)
        in_windows = seconds.new_zeros(len(windows), bins).scatter_add(1, windows.clamp(0, bins - 1), seconds)
        return in_windows / self._of_frame()

    def _of_frame(self) -> Tensor:
        """How long a frame counts for, `(rows, 1)`; 1 without frames."""
        frames = (self.seen > -torch.inf).sum(1, keepdim=True)
        length = (self.end - self.begin) / frames.clamp(min=1)
        return torch.where(frames > 0, length, 1.0).clamp(min=SHORTEST)
