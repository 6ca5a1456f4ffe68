"""Data folders: a jsonl of annotations beside the videos, and frames decoded by PyAV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np


ANNOTATIONS = "annotations.jsonl"
SPLITS = ("train", "validation", "test")


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
        ValueError: if a line isn't such an object, or a split has none; the message says which line.
    """
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise FileNotFoundError(f"{path} isn't there: {option} names a folder with an {ANNOTATIONS} and the videos.")
    entries = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if text.strip():
            entries.append((_parse(text, folder, texts, f"{path}:{number}"), f"{path}:{number}"))
    if not entries:
        raise ValueError(f"{path} has no line.")
    missing = [split for split in SPLITS if not any(entry.get("split") == split for entry, _ in entries)]
    if missing and "split" in texts:
        raise ValueError(f"{path} has no line with split {missing[0]!r}; it needs some of each of {SPLITS}.")
    return entries


def _parse(text: str, folder: Path, texts: tuple[str, ...], line: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{line}: not valid JSON ({error}).") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{line}: expected an object with 'video', {texts[0]!r}, ..., got {type(entry).__name__}.")
    for field in ("video", *texts):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f"{line}: field {field!r} is missing or no text.")
    if "split" in texts and entry["split"] not in SPLITS:
        raise ValueError(f"{line}: `split` must be one of {SPLITS}, got {entry['split']!r}.")
    video = folder / entry["video"]
    if not video.is_file():
        raise FileNotFoundError(f"{line}: the video {video} isn't there.")
    return entry


def is_span(value: Any) -> bool:
    """Whether this is `[start, end]` in seconds, with 0 <= start < end."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(second, (int, float)) for second in value)
        and 0 <= value[0] < value[1]
    )


def decode_clips(path: Path, clip_seconds: float) -> np.ndarray:
    """The frame in the middle of each clip of a video.

    Args:
        path: the video file.
        clip_seconds: length of a clip; what is left at the end counts as one if it is at least half as long.

    Returns:
        `(clips, height, width, 3)`, uint8, RGB.

    Raises:
        ValueError: if the file can't be decoded or holds no frame.
    """
    frames, times = [], []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream.")
            stream = container.streams.video[0]
            frame_seconds = float(1 / stream.average_rate) if stream.average_rate else 0.0
            for frame in container.decode(stream):
                second = frame.time or 0.0
                # Of all frames up to now keep the first at or after the middle of each clip.
                if second >= (len(frames) + 0.5) * clip_seconds - 1e-6:
                    frames.append(frame.to_ndarray(format="rgb24"))
                times.append(second)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded as a video: {error}.") from error
    if not times:
        raise ValueError(f"{path} holds no frame that can be decoded.")
    if not frames:
        raise ValueError(
            f"{path} is {times[-1] + frame_seconds:.2f} seconds long, shorter than half a clip of {clip_seconds} "
            "seconds: set a smaller --clip-seconds."
        )
    return np.stack(frames)
