"""Videos with sentences, from files on disk: a jsonl of annotations, and the clips of a video decoded by PyAV."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np


ANNOTATIONS = "annotations.jsonl"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Annotation:
    """One sentence about one video.

    Attributes:
        video: path of the video file.
        query: the sentence.
        split: `"train"`, `"validation"` or `"test"`.
        relevant_windows: what the sentence means, `[start, end]` in seconds; None if `clip_labels` says it.
        clip_labels: 1 for every clip that the sentence means, else 0; None if `relevant_windows` says it.
        line: `path:line` of the annotation, for messages.
    """

    video: Path
    query: str
    split: str
    relevant_windows: list[list[float]] | None
    clip_labels: list[int] | None
    line: str

    def labels(self, num_clips: int, clip_seconds: float) -> np.ndarray:
        """Which clips are meant: those of which at least half lies in a relevant window.

        Args:
            num_clips: clips in the video; clip i covers seconds `i * clip_seconds` to `(i + 1) * clip_seconds`.
            clip_seconds: length of a clip.

        Returns:
            `(num_clips,)`, float32, 0 or 1.

        Raises:
            ValueError: if there are labels for another number of clips.
        """
        if self.clip_labels is not None:
            if len(self.clip_labels) != num_clips:
                raise ValueError(
                    f"{self.line}: {len(self.clip_labels)} `clip_labels`, but {self.video} has {num_clips} clips of "
                    f"{clip_seconds} seconds. Give one label a clip, or set --clip-seconds."
                )
            return np.array(self.clip_labels, dtype=np.float32)
        start = np.arange(num_clips) * clip_seconds
        covered = np.zeros(num_clips)
        for low, high in self.relevant_windows or ():
            covered += np.clip(np.minimum(high, start + clip_seconds) - np.maximum(low, start), 0, None)
        return (covered >= clip_seconds / 2).astype(np.float32)


def read_annotations(folder: Path) -> list[Annotation]:
    """Read `annotations.jsonl` of a data folder.

    Each line is an object with `video` (a path relative to the folder), `query`, `split` and either `relevant_windows`
    (pairs of seconds) or `clip_labels` (0 or 1 per clip).

    Raises:
        FileNotFoundError: if the file, or a video that it names, isn't there.
        ValueError: if a line isn't such an object; the message says which line, and what is wrong with it.
    """
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise FileNotFoundError(f"{path} isn't there: --data names a folder with an {ANNOTATIONS} and the videos.")
    annotations = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if text.strip():
            annotations.append(_parse(text, folder, f"{path}:{number}"))
    missing = [split for split in SPLITS if not any(a.split == split for a in annotations)]
    if missing:
        raise ValueError(f"{path} has no line with split {missing[0]!r}; it needs some of each of {SPLITS}.")
    return annotations


def _parse(text: str, folder: Path, line: str) -> Annotation:
    try:
        entry: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{line}: not valid JSON ({error}).") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{line}: expected an object with 'video', 'query', ..., got {type(entry).__name__}.")
    for field in ("video", "query", "split"):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f"{line}: field {field!r} is missing or no text.")
    if entry["split"] not in SPLITS:
        raise ValueError(f"{line}: `split` must be one of {SPLITS}, got {entry['split']!r}.")
    windows, labels = entry.get("relevant_windows"), entry.get("clip_labels")
    if (windows is None) == (labels is None):
        raise ValueError(f"{line}: needs either 'relevant_windows' or 'clip_labels', and not both.")
    if windows is not None and not _are_windows(windows):
        raise ValueError(
            f"{line}: `relevant_windows` must be pairs of seconds [start, end], start < end: {windows!r}."
        )
    if labels is not None and not (isinstance(labels, list) and all(label in (0, 1) for label in labels)):
        raise ValueError(f"{line}: `clip_labels` must be a list of 0 and 1, got {labels!r}.")
    video = folder / entry["video"]
    if not video.is_file():
        raise FileNotFoundError(f"{line}: the video {video} isn't there.")
    return Annotation(video, entry["query"], entry["split"], windows, labels, line)


def _are_windows(windows: Any) -> bool:
    return isinstance(windows, list) and all(
        isinstance(window, list)
        and len(window) == 2
        and all(isinstance(second, (int, float)) for second in window)
        and 0 <= window[0] < window[1]
        for window in windows
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
