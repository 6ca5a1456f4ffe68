"""Frames and sound of media files and arrays: sampled evenly, resampled to one rate. Files are read with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


Path = str | os.PathLike[str]


def even_places(count: int, wanted: int) -> NDArray[np.int64]:
    """Indices of the frames in the middle of `wanted` equal parts of a video; all frames if there are fewer."""
    wanted = min(wanted, count)
    return ((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)


def read_frames(path: Path, wanted: int) -> NDArray[np.uint8]:
    """Frames of a video file, evenly over its length.

    Args:
        path: a file in any format that FFmpeg knows.
        wanted: how many frames; all if the video has fewer.

    Returns:
        `(frames, height, width, 3)`, RGB.

    Raises:
        ImportError: if PyAV isn't installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no picture or can't be decoded; the message names it.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video track.")
        stream = container.streams.video[0]
        # What the file says of itself may be missing or wrong: count its packets.
        count = sum(packet.size > 0 for packet in container.demux(stream))
    with _opened(path) as container:
        places = set(even_places(count, wanted).tolist())
        decoded = enumerate(container.decode(video=0))
        frames = [frame.to_ndarray(format="rgb24") for place, frame in decoded if place in places]
    if not frames:
        raise ValueError(f"{path} has a video track, but no frame in it could be decoded.")
    return np.stack(frames)


def read_sound(path: Path, rate: int) -> NDArray[np.float32] | None:
    """Sound of a media file, mixed to one channel.

    Args:
        path: a file in any format that FFmpeg knows, with or without pictures.
        rate: samples a second to resample to.

    Returns:
        `(samples,)` in [-1, 1]; None if the file has no sound.

    Raises:
        ImportError: if PyAV isn't installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file can't be decoded; the message names it.
    """
    with _opened(path) as container:
        if not container.streams.audio:
            return None
        return _resampled(container.decode(audio=0), rate)


def resample(sound: NDArray[Any], rate: int, wanted: int) -> NDArray[np.float32]:
    """Sound at another rate.

    Args:
        sound: `(samples,)`, floats in [-1, 1].
        rate: its samples a second.
        wanted: samples a second to resample to.

    Returns:
        `(samples,)`.

    Raises:
        ImportError: if the rates differ and PyAV isn't installed.
    """
    sound = np.ascontiguousarray(sound, dtype=np.float32)
    if rate == wanted:
        return sound
    frame = _av().AudioFrame.from_ndarray(sound[None], format="flt", layout="mono")
    frame.sample_rate = rate
    return _resampled([frame], wanted)


def _resampled(frames: Any, rate: int) -> NDArray[np.float32]:
    resampler = _av().AudioResampler(format="flt", layout="mono", rate=rate)
    parts: list[NDArray[np.float32]] = []
    for frame in [*frames, None]:  # None gets what the resampler still holds
        parts.extend(part.to_ndarray()[0] for part in resampler.resample(frame))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A media file, opened; whatever is wrong with it names it."""
    av = _av()
    try:
        with av.open(os.fspath(path), metadata_errors="ignore") as container:
            yield container
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {os.fspath(path)}.") from None
    except (av.error.FFmpegError, OverflowError, ZeroDivisionError, MemoryError) as error:
        raise ValueError(f"{os.fspath(path)} can't be read as a media file: {error}.") from error


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading and resampling media needs PyAV: pip install av") from error
    return av
