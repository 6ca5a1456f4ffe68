"""Video tokens by frame: many patches of one frame are one frame."""

from __future__ import annotations

import torch
from torch import Tensor

from .source import Batch


def frame_numbers(video: Tensor, batch: Batch) -> Tensor:
    """Which frame of its sample each video token belongs to.

    Frames are the runs of video tokens, where text or special tokens stand between them. Where a whole video is one
    run, they are the frames that `video_grid_thw` (or `image_grid_thw`) counts, or those of `pixel_values_videos`
    `(videos, frames, channels, height, width)`.

    Args:
        video: `(batch, time)`, bool, true where a token is video.
        batch: what the model was given.

    Returns:
        `(batch, time)`, from 0 for the first frame of a row on; -1 for other tokens.

    Raises:
        ValueError: if neither tells.
    """
    begins = video & ~torch.cat([torch.zeros_like(video[:, :1]), video[:, :-1]], dim=1)
    runs = int(begins.sum())
    lengths = _lengths_by_grid(video, batch, runs)
    if lengths is None:
        lengths = _lengths_by_pixels(video, batch, runs)
    if lengths is None:
        if runs <= int(video.any(1).sum()):
            raise ValueError(
                "pvla_pool_frames=True can't tell the frames: all of a sample's video tokens follow each other, and "
                "neither `video_grid_thw` nor `pixel_values_videos` says how many frames they are of. Leave it out, "
                "or give the Trainer a function as `pvla_states`."
            )
        return torch.where(video, begins.cumsum(1) - 1, -1)
    starts = torch.zeros(int(video.sum()) + 1, dtype=torch.long, device=video.device)
    starts[lengths.cumsum(0)] = 1
    starts[0] = 1
    numbers = torch.full(video.shape, -1, device=video.device)
    numbers[video] = starts[:-1].cumsum(0) - 1
    first = numbers.masked_fill(~video, numbers.max().item() + 1).amin(1, keepdim=True)
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


def _lengths_by_grid(video: Tensor, batch: Batch, runs: int) -> Tensor | None:
    """How many tokens each frame has, in the order of the batch; None where no grid counts these tokens."""
    for name in ("video_grid_thw", "image_grid_thw"):
        grid, other = batch.get(name), batch.get("image_grid_thw" if name[0] == "v" else "video_grid_thw")
        if not isinstance(grid, Tensor) or isinstance(other, Tensor) or runs != len(grid):
            continue  # images beside videos, or frames that are runs of their own
        patches, tokens = int(grid.prod(1).sum()), int(video.sum())
        if tokens and patches % tokens == 0:
            return (grid[:, 1] * grid[:, 2] // (patches // tokens)).repeat_interleave(grid[:, 0])
    return None


def _lengths_by_pixels(video: Tensor, batch: Batch, runs: int) -> Tensor | None:
    """Likewise, of videos that are one run each and have as many frames as each other."""
    pixels = batch.get("pixel_values_videos")
    if not isinstance(pixels, Tensor) or pixels.ndim != 5 or runs != len(pixels):
        return None
    frames, tokens = pixels.shape[1], int(video.sum()) // len(pixels)
    # LLaVA-OneVision ends a video with one token more.
    each = torch.full((frames,), tokens // frames, device=video.device)
    each[-1] += tokens % frames
    return each.repeat(len(pixels)) if int(video.sum()) % len(pixels) == 0 and tokens % frames <= 1 else None
