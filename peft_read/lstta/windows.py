"""Which window of its clip every time step of every tower falls into: index arithmetic, once per forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .clock import Clock, Extent


@dataclass(frozen=True)
class WindowedSteps:
    """Where the time steps of one tower lie.

    Attributes:
        valid: `(batch, steps)` bool, false on padding.
        position: `(batch, steps)`, between 0 and 1 within the valid extent of the clip.
        time: `(batch, steps)`, time since the beginning of the step's window, in frames.
        take: `(batch, windows, places)`, the step at each place of each window.
        filled: `(batch, windows, places)` bool, false where a window has fewer steps than places.
        place: `(batch, steps)`, the place of each step, counted through all windows of its clip.
    """

    valid: Tensor
    position: Tensor
    time: Tensor
    take: Tensor
    filled: Tensor
    place: Tensor

    def split(self, x: Tensor) -> Tensor:
        """`(batch, steps, ...)` to `(batch, windows, places, ...)`; what stands at unfilled places means nothing."""
        return _pick(x, self.take.flatten(1)).unflatten(1, self.take.shape[1:])

    def join(self, x: Tensor) -> Tensor:
        """`(batch, windows, places, ...)` back to `(batch, steps, ...)`, zero on padding."""
        steps = _pick(x.flatten(1, 2), self.place)
        return steps.masked_fill(~self.valid[(...,) + (None,) * (steps.ndim - 2)], 0)

    def at_frames(self, x: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Means of `x (batch, steps, dim)` over the steps at the time of each frame, of `window` frames in a window.

        Returns:
            `(batch, windows * window, dim)`, and `(batch, windows * window)` bool, false where there are no steps.
        """
        frame = torch.arange(window, device=x.device)
        inside = (self.split(self.time).floor()[..., None] == frame) & self.filled[..., None]
        sums = inside.to(x.dtype).transpose(2, 3) @ self.split(x)
        counts = inside.sum(2)
        return (sums / counts.clamp(min=1)[..., None]).flatten(1, 2), counts.flatten(1) > 0


@dataclass(frozen=True)
class Windows:
    """The windows of all clips of a batch.

    Attributes:
        window: frames in a window.
        count: windows of a clip.
        steps: the time steps by tower, of those that have a time axis.
        outside: `(batch, windows)`, how many frames would last as long as the sound of a window that no frame is in;
            0 for windows with frames. None where pictures and sound begin and end together.
    """

    window: int
    count: int
    steps: dict[str, WindowedSteps]
    outside: Tensor | None = None

    def weights(self, importance: Tensor | None) -> Tensor | None:
        """How much each window counts for tokens that belong to all of them.

        Args:
            importance: `(batch, frames)`, importance of the frames; all alike where None.

        Returns:
            `(batch, windows)`, rows of sum 1: the importance of a window's frames, or the length of its sound in
            frames where it has none; where a clip has no frames, the number of its steps of sound; where it has
            neither, its first window is the whole clip. None if there is but one window.
        """
        if self.count == 1:
            return None
        some = next(iter(self.steps.values())).filled
        weights = F.one_hot(some.new_zeros(len(some), dtype=torch.long), self.count).float()
        for tower in ("audio", "vision"):
            if tower in self.steps:
                steps = self.steps[tower]
                own = steps.filled
                if tower == "vision" and importance is not None:
                    own = own * steps.split(importance)
                own = own.sum(-1)
                if tower == "vision" and self.outside is not None:
                    own = own + self.outside
                weights = torch.where(steps.valid.any(1, keepdim=True), own, weights)
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def plan_windows(
    steps: Mapping[str, int],
    masks: Mapping[str, Tensor],
    *,
    batch: int,
    window: int,
    num_audio_windows: int,
    device: torch.device,
    times: Mapping[str, Tensor] | None = None,
) -> Windows:
    """Cut every clip into windows.

    A window holds `window` frames, and the sound that is heard while these are shown. Where `times` are known, that is
    so in seconds: sound between two frames goes with the earlier one, and sound before the first frame or after the
    last is in windows without frames, equal ones about as long as those with frames, at most `num_audio_windows` of
    each. Else a clip's pictures and sound are taken to begin and to end together: sound goes by its place within the
    valid length, from the first valid step to the last. A clip without frames, be they missing for all clips or masked
    out for this one, has `num_audio_windows` equal windows of its sound.

    Args:
        steps: number of time steps of the towers `"vision"` and `"audio"`, as far as they have a time axis.
        masks: `(batch, steps)` bool, true where a step is valid; towers without padding may be left out.
        batch: number of clips.
        window: frames in a window.
        num_audio_windows: windows of a clip without frames.
        device: where the indices are needed.
        times: `(batch, steps, 2)` of both towers, from when to when each step is, in seconds on one clock; None where
            it isn't known.
    """
    # Without masks and times all clips are alike: one is planned, away from the device, which nothing has to wait for.
    rows, planning = (batch, device) if masks or times else (1, torch.device("cpu"))
    extents = {
        tower: Extent.of(masks.get(tower, torch.ones(rows, count, dtype=torch.bool)).to(planning))
        for tower, count in steps.items()
    }
    vision, audio = extents.get("vision"), extents.get("audio")
    frame_windows = 0 if vision is None else -(-steps["vision"] // window)
    bins = max(frame_windows, num_audio_windows if audio is not None else 0, 1)
    positions = {tower: extent.position for tower, extent in extents.items()}
    placed: dict[str, tuple[Tensor, Tensor]] = {}
    outside: Tensor | None = None
    if vision is not None:
        placed["vision"] = vision.offset // window, (vision.offset % window).float()
    if audio is not None:
        # In integers, since a step at the border of two windows must not depend on rounding.
        share = (2 * audio.offset + 1) * num_audio_windows
        whole = 2 * audio.length.clamp(min=1)
        placed["audio"] = share // whole, (share % whole) / whole * window
        if vision is not None:
            framed = vision.length > 0
            if times:
                clock = Clock.of(times["vision"].to(planning), vision, times["audio"].to(planning), audio)
                by_frame = clock.place(vision, window, frame_windows, num_audio_windows)
                on_clock = clock.positions(vision.valid, audio.valid)
                positions = {m: torch.where(framed, on_clock[m], position) for m, position in positions.items()}
                bins = frame_windows + 2 * num_audio_windows
                outside = clock.outside(by_frame[0], audio.valid, bins)
            else:
                frame = (2 * audio.offset + 1) * vision.length // whole
                by_frame = frame // window, (frame % window).float()
            placed["audio"] = (
                torch.where(framed, by_frame[0], placed["audio"][0]),
                torch.where(framed, by_frame[1], placed["audio"][1]),
            )
    index = {tower: torch.where(extents[tower].valid, placed[tower][0], bins) for tower in placed}
    counts = {tower: _count(index[tower], bins + 1) for tower in placed}
    # The one point at which the device is waited for, and only where there are masks or times.
    most = torch.stack([each[:, :bins].amax(0) for each in counts.values()]).tolist() if counts else []
    used = max((w + 1 for each in most for w, number in enumerate(each) if number), default=1)
    planned = {}
    for tower, per_window in zip(placed, most, strict=True):
        grouped = _group(index[tower], counts[tower], used, max(1, *per_window))
        planned[tower] = WindowedSteps(extents[tower].valid, positions[tower], placed[tower][1], *grouped)
    planned = {tower: _spread(each, batch, device) for tower, each in planned.items()}
    return Windows(window, used, planned, None if outside is None else outside[:, :used].to(device))


def _count(index: Tensor, bins: int) -> Tensor:
    counts = index.new_zeros(len(index), bins)
    return counts.scatter_add(1, index, torch.ones_like(index))


def _group(index: Tensor, counts: Tensor, windows: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """`take`, `filled` and `place` of steps in the windows that `index` names; the last of its bins is for padding."""
    order = index.argsort(dim=1, stable=True)
    starts = counts.cumsum(1) - counts
    place = torch.arange(places, device=index.device)
    slots = starts[:, :windows, None] + place
    filled = place < counts[:, :windows, None]
    take = order.gather(1, slots.clamp(max=index.shape[1] - 1).flatten(1)).view_as(slots)
    rank = order.argsort(dim=1)
    inside = index < windows
    back = index * places + rank - starts.gather(1, index)
    return take, filled, torch.where(inside, back, 0)


def _spread(steps: WindowedSteps, batch: int, device: torch.device) -> WindowedSteps:
    """The same for each clip of a batch, on the device."""
    values = (getattr(steps, field.name) for field in fields(steps))
    return WindowedSteps(*(value.to(device, non_blocking=True).expand(batch, *value.shape[1:]) for value in values))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """`x (batch, n, ...)` at `index (batch, m)` of each row: `(batch, m, ...)`."""
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (rows + index).flatten()).unflatten(0, index.shape)
