"""Data folders: a jsonl of annotations beside the videos, and frames decoded by PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np

from .json_lines import read_json_lines


ANNOTATIONS = "annotations.jsonl"
SPLITS = ("train", "validation", "test")
LATEST = 1e9  # second of a video that an annotation may name
LONGEST_PATH = 4096  # characters
# Pixels of the shorter side of the frames that are kept, more than most vision models take, and of a frame that is
# decoded at all.
SHORTER_SIDE, MOST_PIXELS = 384, 100_000_000


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
    """The frame in the middle of each clip of a video, made smaller if need be.

    Args:
        path: the video file.
        clip_seconds: length of a clip; what is left at the end counts as one if it is at least half as long.

    Returns:
        `(clips, height, width, 3)`, uint8, RGB; the shorter side has `SHORTER_SIDE` pixels at most.

    Raises:
        ValueError: if the file can't be decoded or holds no frame; the message names it.
    """
    return np.stack(list(iterate_clips(path, clip_seconds)))


def iterate_clips(path: Path, clip_seconds: float) -> Iterator[np.ndarray]:
    """The frames of `decode_clips`, one by one: of a long video none has to be kept."""
    clips, second, frame_seconds, size = 0, None, 0.0, None
    with opened(path) as container:
        stream = video_stream(container, path)
        frame_seconds = float(1 / stream.average_rate) if stream.average_rate else 0.0
        for frame in container.decode(stream):
            second = frame.time or 0.0
            # Of all frames up to now keep the first at or after the middle of each clip.
            if second >= (clips + 0.5) * clip_seconds - 1e-6:
                size = size or _size(frame.height, frame.width)  # of the first, should they differ
                yield frame.to_ndarray(format="rgb24", height=size[0], width=size[1])
                clips += 1
    if second is None:
        raise ValueError(f"{path} holds no frame that can be decoded.")
    if not clips:
        raise ValueError(
            f"{path} is {second + frame_seconds:.2f} seconds long, shorter than half a clip of {clip_seconds} "
            "seconds: set a smaller --clip-seconds."
        )


def _size(height: int, width: int) -> tuple[int, int]:
    """Height and width, in proportion, with `SHORTER_SIDE` pixels at most on the shorter side."""
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
    """The first video stream of a file.

    Raises:
        ValueError: if there is none, or its frames are too large.
    """
    if not container.streams.video:
        raise ValueError(f"{path} has no video stream.")
    stream = container.streams.video[0]
    if stream.height * stream.width > MOST_PIXELS:
        raise ValueError(f"{path} has frames of {stream.width} x {stream.height} pixels: more than {MOST_PIXELS:,}.")
    return stream
