"""Video tokens by frame: many patches of one frame are one frame."""

from __future__ import annotations

import torch
from torch import Tensor

from .source import Batch


PIXELS = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw")


def frame_numbers(video: Tensor, batch: Batch) -> Tensor:
    """Which frame of its sample each video token belongs to.

    Where text or special tokens stand between a video's frames, each run of video tokens is a frame. Where a whole
    video is one run, its frames are those that `video_grid_thw` (or `image_grid_thw`) counts, or those of
    `pixel_values_videos` `(videos, frames, channels, height, width)`.

    Args:
        video: `(batch, time)`, bool, true where a token is video.
        batch: what the model was given.

    Returns:
        `(batch, time)`, from 0 for the first frame of a row on; -1 for other tokens.

    Raises:
        ValueError: if neither tells.

    Example:
        >>> video = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
        >>> frame_numbers(video, {"video_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 4], [2, 2, 4]])})
        tensor([[-1,  0,  0, -1,  1,  1],
                [ 0,  0,  1,  1, -1, -1]])
    """
    begins = video & ~torch.cat([torch.zeros_like(video[:, :1]), video[:, :-1]], dim=1)
    run = begins.flatten().cumsum(0)[video.flatten()] - 1  # of each video token
    lengths = torch.bincount(run, minlength=1)
    frames = _frames_of_runs(lengths, int(video.any(1).sum()), batch)
    place = torch.arange(len(run), device=run.device) - (lengths.cumsum(0) - lengths)[run]
    in_run = torch.minimum(place // (lengths // frames)[run], frames[run] - 1)
    numbers = torch.full(video.shape, -1, device=video.device)
    numbers[video] = (frames.cumsum(0) - frames)[run] + in_run
    # The first of a row is 0.
    first = numbers.masked_fill(~video, torch.iinfo(numbers.dtype).max).amin(1, keepdim=True)
    return torch.where(video, numbers - first, -1)


def pooled_by_frame(states: list[Tensor], numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each frame's states: `(blocks * batch, frames, dim)`, and which frames there are.

    Args:
        states: `(batch, time, dim)` of each block.
        numbers: as `frame_numbers` gives them.
    """
    frames = max(int(numbers.max()) + 1, 1)
    index = numbers.masked_fill(numbers < 0, frames)
    counts = torch.zeros(len(numbers), frames + 1, device=numbers.device)
    counts = counts.scatter_add(1, index, torch.ones_like(index, dtype=counts.dtype))
    means = []
    for x in states:
        sums = x.new_zeros(len(x), frames + 1, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
        sums = sums.scatter_add(1, index[..., None].expand_as(x), x.to(sums.dtype))
        means.append(sums[:, :-1] / counts[:, :-1, None].clamp(min=1))
    return torch.cat(means), (counts[:, :-1] > 0).repeat(len(states), 1)


def _frames_of_runs(lengths: Tensor, rows: int, batch: Batch) -> Tensor:
    """How many frames each run of video tokens holds, `(runs,)`.

    Args:
        lengths: of the runs, in tokens, `(runs,)`.
        rows: of the batch that have any.
        batch: what the model was given.
    """
    runs, by_grid, by_pixels = len(lengths), _frames_by_grid(batch), _frames_by_pixels(batch)
    told = by_pixels if by_grid is None else by_grid
    has_both = any(all(isinstance(batch.get(name), Tensor) for name in names) for names in (PIXELS, GRIDS))
    is_each_a_frame = runs > rows  # where some video is several runs, its frames are
    if told is not None:  # fewer runs than frames where a processor leaves frames out that are like the one before
        is_each_a_frame = runs == int(told.sum()) or len(told) < runs < int(told.sum())
    if is_each_a_frame and not (has_both and by_grid is None):
        return torch.ones_like(lengths)
    if told is not None and len(told) == runs and not has_both:  # else images and videos come in an unknown order
        told = told.to(lengths.device)
        rest = lengths % told
        # LLaVA-OneVision, which has no grid, ends a video with one token more.
        if (lengths >= told).all() and (rest <= (by_grid is None)).all():
            return told
    raise ValueError(
        "pvla_pool_frames=True can't tell the frames of this batch: there are not as many runs of video tokens as "
        "frames, and neither `video_grid_thw` nor `pixel_values_videos` says how many frames each run is of. Leave it "
        "out, keep images and videos in batches of their own, or give the Trainer a function as `pvla_states`."
    )


def _frames_by_grid(batch: Batch) -> Tensor | None:
    """How many frames each image and video of a batch has; None where there is no grid."""
    grids = [grid[:, 0] for name in GRIDS if isinstance(grid := batch.get(name), Tensor)]
    return torch.cat(grids) if grids else None


def _frames_by_pixels(batch: Batch) -> Tensor | None:
    """Likewise, by the axis of frames of videos that have as many as each other."""
    pixels = batch.get(PIXELS[1])
    if not isinstance(pixels, Tensor) or pixels.ndim != 5:
        return None
    return torch.full((pixels.shape[0],), pixels.shape[1], device=pixels.device)
