"""Videos with sentences, from files on disk."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common.annotations import is_span, read_entries


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
        lows, highs = _merged(self.relevant_windows or [], num_clips * clip_seconds)
        first, last = (np.minimum(times // clip_seconds, num_clips - 1).astype(int) for times in (lows, highs))
        short = first == last  # within one clip
        np.add.at(covered, first[short], (highs - lows)[short])
        for low, high in zip(lows[~short], highs[~short], strict=True):  # no more than there are clips
            covered += np.clip(np.minimum(high, start + clip_seconds) - np.maximum(low, start), 0, None)
        return (covered >= clip_seconds / 2).astype(np.float32)


def _merged(windows: list[list[float]], end: float) -> tuple[np.ndarray, np.ndarray]:
    """Where windows begin and end before `end`, in order; those that overlap are one: no second counts twice."""
    lows, highs = np.array(windows, dtype=np.float64).reshape(-1, 2).T
    order = np.argsort(lows, kind="stable")
    order = order[lows[order] < end]
    lows, highs = lows[order], np.maximum.accumulate(np.minimum(highs[order], end))
    begins = np.flatnonzero(np.r_[True, lows[1:] > highs[:-1]][: len(lows)])
    return lows[begins], np.maximum.reduceat(highs, begins) if len(begins) else highs


def read_annotations(folder: Path) -> list[Annotation]:
    """Read `annotations.jsonl` of a data folder.

    Each line is an object with `video` (a path relative to the folder), `query`, `split` and either `relevant_windows`
    (pairs of seconds) or `clip_labels` (0 or 1 per clip).

    Raises:
        FileNotFoundError: if the file, or a video that it names, isn't there.
        ValueError: if a line isn't such an object; the message says which line, and what is wrong with it.
    """
    return [_annotation(entry, folder, line) for entry, line in read_entries(folder)]


@dataclass(frozen=True)
class Caption:
    """A video and a sentence that says what is in it, without labels.

    Attributes:
        video: path of the video file.
        caption: the sentence.
    """

    video: Path
    caption: str


def read_captions(folder: Path) -> list[Caption]:
    """Read `annotations.jsonl` of a folder of pairs: objects with `video`, relative to the folder, and `caption`.

    Raises:
        FileNotFoundError: if the file, or a video that it names, isn't there.
        ValueError: if a line isn't such an object; the message says which line, and what is wrong with it.
    """
    entries = read_entries(folder, texts=("caption",), option="--pairs")
    return [Caption(folder / entry["video"], entry["caption"]) for entry, _ in entries]


def _annotation(entry: dict[str, Any], folder: Path, line: str) -> Annotation:
    windows, labels = entry.get("relevant_windows"), entry.get("clip_labels")
    if (windows is None) == (labels is None):
        raise ValueError(f"{line}: needs either 'relevant_windows' or 'clip_labels', and not both.")
    if windows is not None and not (isinstance(windows, list) and all(map(is_span, windows))):
        raise ValueError(
            f"{line}: `relevant_windows` must be pairs of seconds [start, end], start < end: {reprlib.repr(windows)}."
        )
    if labels is not None and not (isinstance(labels, list) and all(label in (0, 1) for label in labels)):
        raise ValueError(f"{line}: `clip_labels` must be a list of 0 and 1, got {reprlib.repr(labels)}.")
    return Annotation(folder / entry["video"], entry["query"], entry["split"], windows, labels, line)
