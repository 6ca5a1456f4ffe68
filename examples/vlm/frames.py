"""Frames of a video at a low rate, with the times at which they were taken."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from common.annotations import opened, video_stream
from transformers.video_utils import VideoMetadata

from peft_read.trimodal.media import upright, upright_size


Video = tuple[np.ndarray, VideoMetadata]


@functools.lru_cache(maxsize=256)
def decode_frames(path: Path, fps: float, max_frames: int, max_pixels: int | None = None) -> Video:
    """Frames of a video, evenly spaced in time.

    Args:
        path: the video file.
        fps: frames a second, at most those that the video has.
        max_frames: of a video with more at that rate, as many, over the whole of it.
        max_pixels: frames with more are made smaller, in proportion.

    Returns:
        Frames `(frames, height, width, 3)`, uint8, RGB, upright with square pixels, and what transformers' processors
        must know of them: which frames of the video they are, how many a second those are, and how long it is.

    Raises:
        ValueError: if the file can't be decoded or holds no frame.
    """
    with opened(path) as container:
        stream = video_stream(container, path)
        # When frames are shown, without decoding them: packets come in another order.
        shown = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not shown:
            raise ValueError(f"{path} holds no frame that can be decoded.")
        rate = float(stream.average_rate or 0) or 1.0
        times = np.array([float((moment - shown[0]) * stream.time_base) for moment in shown])
        duration = float(times[-1]) + 1 / rate
        wanted = {shown[number]: times[number] for number in _wanted(times, duration, min(fps, rate), max_frames)}
        container.seek(0)
        kept, size = {}, None
        for frame in container.decode(stream):
            if frame.pts in wanted:
                size = size or _size(*upright_size(frame, stream), max_pixels)
                kept[wanted[frame.pts]] = upright(frame, stream, size)
    if size is None:
        raise ValueError(f"{path} holds no frame that can be decoded.")
    # Processors take an index over the rate for a time, so where the rate varies these are frames of a steady one.
    indices = [round(second * rate) for second in sorted(kept)]
    metadata = VideoMetadata(
        total_num_frames=max(round(duration * rate), indices[-1] + 1),
        fps=rate,
        duration=duration,
        frames_indices=indices,
        height=size[0],
        width=size[1],
        video_backend="pyav",
    )
    return np.stack([kept[second] for second in sorted(kept)]), metadata


def _wanted(times: np.ndarray, duration: float, fps: float, max_frames: int) -> set[int]:
    """Numbers of the frames nearest to evenly spaced times."""
    count = min(max(int(duration * fps + 1e-6), 1), max_frames)
    return {int(np.abs(times - second).argmin()) for second in np.arange(count) * duration / count}


def _size(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    return max(int(height * scale), 1), max(int(width * scale), 1)
