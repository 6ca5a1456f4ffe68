"""Data folders: a jsonl of annotations beside the videos, and frames decoded by PyAV."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.format
import av.stream
import numpy as np

from peft_read.trimodal.media import upright, upright_size

from .json_lines import read_json_lines


ANNOTATIONS = "annotations.jsonl"
SPLITS = ("train", "validation", "test")
LATEST = 1e9  # second of a video that an annotation may name
LONGEST_PATH = 4096  # characters
# Pixels of the shorter side of the frames that are kept, more than most vision models take, and of a frame that is
# decoded at all.
SHORTER_SIDE, MOST_PIXELS = 384, 100_000_000
LONGEST_SHOWN = 3600.0  # seconds of one frame; longer are those of damaged time stamps
ROUNDING = 1e-6  # seconds by which time stamps that are meant to be the same may differ
NO_ZERO = av.format.Flags.ts_discont.value  # formats whose time stamps may begin anywhere


def read_entries(
    folder: Path, texts: tuple[str, ...] = ("query", "split"), option: str = "--data"
) -> list[tuple[dict[str, Any], str]]:
    """The objects in `annotations.jsonl` of a data folder, each with its `path:line` for messages.

    Args:
        folder: the data folder.
        texts: fields with a text that every one has, beside `video`, the path of a file relative to the folder. If
            `split` is among them, there are some of each split.
        option: what names the folder on the command line.

    Raises:
        FileNotFoundError: if the file, or a video that it names, isn't there.
        ValueError: if a line isn't such an object, a video lies outside of the folder, or a split has none; the
            message says which line.
    """
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise FileNotFoundError(f"{path} isn't there: {option} names a folder with an {ANNOTATIONS} and the videos.")
    root, known = os.path.realpath(folder), set[str]()
    entries = []
    for entry, line in read_json_lines(path):
        _check(entry, texts, line)
        if entry["video"] not in known:
            _check_video(entry["video"], folder, root, line)
            known.add(entry["video"])
        entries.append((entry, line))
    if not entries:
        raise ValueError(f"{path} has no line.")
    found = {entry.get("split") for entry, _ in entries} if "split" in texts else set(SPLITS)
    missing = [split for split in SPLITS if split not in found]
    if missing:
        raise ValueError(f"{path} has no line with split {missing[0]!r}; it needs some of each of {SPLITS}.")
    return entries


def _check(entry: dict[str, Any], texts: tuple[str, ...], line: str) -> None:
    """Refuse an object without the fields that each must have."""
    for field in ("video", *texts):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f"{line}: field {field!r} is missing or no text.")
        try:
            entry[field].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{line}: field {field!r} holds half of a character (a lone surrogate).") from None
    if "split" in texts and entry["split"] not in SPLITS:
        raise ValueError(f"{line}: `split` must be one of {SPLITS}, got {entry['split']!r}.")


def _check_video(name: str, folder: Path, root: str, line: str) -> None:
    """Refuse a video that isn't there, or whose file lies elsewhere: who wrote the annotations could read any file."""
    if len(name) > LONGEST_PATH:
        raise ValueError(f"{line}: `video` is no path of a file: it has {len(name):,} characters.")
    try:
        inside = os.path.realpath(folder / name).startswith(root.rstrip(os.sep) + os.sep)
        is_file = (folder / name).is_file()
    except (OSError, ValueError) as error:
        raise ValueError(f"{line}: `video` is no path of a file ({error}).") from None
    if not inside:
        raise ValueError(
            f"{line}: the video {name!r} lies outside of {folder}. `video` has to be a path within the data folder "
            "that leads out of it by no `..` and no link: put the file there."
        )
    if not is_file:
        raise FileNotFoundError(f"{line}: the video {folder / name} isn't there.")


def is_span(value: Any) -> bool:
    """Whether this is `[start, end]` in seconds, with 0 <= start < end."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], (int, float))
        and isinstance(value[1], (int, float))
        and 0 <= value[0] < value[1] <= LATEST
    )


def decode_clips(path: Path, clip_seconds: float) -> np.ndarray:
    """The frame that is shown in the middle of each clip of a video, upright, made smaller if need be.

    Args:
        path: the video file.
        clip_seconds: length of a clip; what is left at the end counts as one if it is at least half as long.

    Returns:
        `(clips, height, width, 3)`, uint8, RGB; the shorter side has `SHORTER_SIDE` pixels at most.

    Raises:
        ValueError: if the file can't be decoded, holds no frame, or one that stands for longer than `LONGEST_SHOWN`;
            the message names it.
    """
    return np.stack(list(iterate_clips(path, clip_seconds)))


def iterate_clips(path: Path, clip_seconds: float) -> Iterator[np.ndarray]:
    """The frames of `decode_clips`, one by one: of a long video none has to be kept."""
    clips, size, end = 0, None, 0.0
    with opened(path) as container:
        stream = video_stream(container, path)
        for frame, end in _shown(container, stream, path):
            image = None
            while (clips + 0.5) * clip_seconds < end - ROUNDING:  # of several clips, where a frame is shown for long
                size = size or _size(frame, stream)  # of the first, should they differ
                image = upright(frame, stream, size) if image is None else image
                yield image
                clips += 1
    if not clips:
        raise ValueError(
            f"{path} is {end:.2f} seconds long, shorter than half a clip of {clip_seconds} seconds: set a smaller "
            "--clip-seconds."
        )


def _shown(container: Any, stream: Any, path: Path) -> Iterator[tuple[Any, float]]:
    """Each frame of a video, and up to which second it is shown; before the first one is, that stands in for it."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    # Transport streams have a clock that began before they did.
    zero = (container.start_time or 0) / av.time_base if container.format.flags & NO_ZERO else 0.0
    held, begin, begins = None, 0.0, deque[float](maxlen=3)
    for frame in container.decode(stream):
        if frame.time is not None:
            begin = frame.time - zero
        elif held is not None:  # a bare stream, without time stamps
            begin += 1 / rate
        if held is not None:
            yield held, _checked(begin, begins[-1], path)
        held = frame
        begins.append(begin)
    if held is None:
        raise ValueError(f"{path} holds no frame that can be decoded.")
    # How long the last one is shown stands in the file, where some have a mere tick, or nothing. Then that is as
    # for the two before it, the shorter time: one of them may be a still.
    usual = min((after - before for before, after in pairwise(begins)), default=1 / rate)
    length = float((held.duration or 0) * (held.time_base or 0))
    # The end itself is the middle of what is left if that is half a clip.
    yield held, _checked(begin + (length if 4 * length >= usual else usual) + 2 * ROUNDING, begin, path)


def _checked(end: float, begin: float, path: Path) -> float:
    """When a frame is shown no more: refused if that can't be."""
    if end - begin > LONGEST_SHOWN:
        raise ValueError(
            f"{path} can't be decoded as a video: its time stamps jump by {end - begin:.0f} seconds at {begin:.0f} s. "
            "Write it anew with right ones, or cut it there."
        )
    return end


def _size(frame: Any, stream: Any) -> tuple[int, int]:
    """Height and width of an upright frame, in proportion, with `SHORTER_SIDE` pixels at most on the shorter side."""
    height, width = upright_size(frame, stream)
    scale = min(1.0, SHORTER_SIDE / min(height, width))
    return round(height * scale), round(width * scale)


@contextmanager
def opened(path: Path, what: str = "decoded") -> Iterator[Any]:
    """A media file, opened; what is wrong with it is a ValueError that names it and `what` it can't be."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            yield container
    except (av.error.FFmpegError, OverflowError, ZeroDivisionError, MemoryError) as error:
        raise ValueError(f"{path} can't be {what} as a video: {error}.") from error


def video_stream(container: Any, path: Path) -> Any:
    """The first video stream of a file that isn't a cover.

    Raises:
        ValueError: if there is none, or its frames are too large.
    """
    cover = av.stream.Disposition.attached_pic
    stream = next((each for each in container.streams.video if not each.disposition & cover), None)
    if stream is None:
        raise ValueError(f"{path} has no video stream.")
    if stream.height * stream.width > MOST_PIXELS:
        raise ValueError(f"{path} has frames of {stream.width} x {stream.height} pixels: more than {MOST_PIXELS:,}.")
    return stream
