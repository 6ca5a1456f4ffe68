"""Videos with transcripts and summaries as How2 has them (VG-BART's layout).

    sum_train/tran.tok.txt, sum_train/desc.tok.txt, and the same in sum_cv and sum_devtest
    video_action_features/{id}.npy

Each line is an id and a text of tokens; the two files are aligned by line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from grounding.files import Source, StoredRows, read_video


SPLITS = {"train": "sum_train", "validation": "sum_cv", "test": "sum_devtest"}
TRANSCRIPTS, SUMMARIES = "tran.tok.txt", "desc.tok.txt"
VIDEO = Source("video_action_features/{name}.npy", 2048, None)
MOST_ROWS = 256


@dataclass
class SummarySample:
    """A video with its summary.

    Attributes:
        name: the video's id.
        video: `(rows, size)`, float32.
        transcript: what is said, "" where nothing is known of it.
        summary: what a summary says.
    """

    name: str
    video: np.ndarray | StoredRows
    transcript: str
    summary: str


def read_how2(folder: Path, split: str, video: Source = VIDEO) -> list[SummarySample]:
    """The videos of a split with transcripts and summaries.

    Args:
        folder: holds a folder for each split, and the folder of features.
        split: `"train"`, `"validation"` or `"test"`.
        video: of each row; the first 256 are read, as they are.

    Raises:
        FileNotFoundError: if a file isn't there.
        ValueError: if the two texts aren't of the same videos, or a line or a file isn't as above; the message says
            which.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))}, got {split!r}.")
    transcripts, summaries = (_lines(folder / SPLITS[split] / name) for name in (TRANSCRIPTS, SUMMARIES))
    path = folder / SPLITS[split] / SUMMARIES
    if len(transcripts) != len(summaries):
        raise ValueError(
            f"{path} has {len(summaries)} lines and {TRANSCRIPTS} beside it {len(transcripts)}: they must be of the "
            "same videos, line by line."
        )
    samples, seen = [], {}
    for number, ((other, transcript), (name, summary)) in enumerate(zip(transcripts, summaries, strict=True), start=1):
        line = f"{path}:{number}"
        if name != other:
            raise ValueError(f"{line} is of video {name!r}, but line {number} of {TRANSCRIPTS} of {other!r}.")
        if not summary:
            raise ValueError(f"{line}: video {name!r} has no summary.")
        if name in seen:
            raise ValueError(f"{line}: video {name!r} is in {seen[name]} already.")
        seen[name] = line
        rows = read_video([video], folder, name, line, most=MOST_ROWS)[0]
        samples.append(SummarySample(name, rows, transcript, summary))
    return samples


def _lines(path: Path) -> list[tuple[str, str]]:
    """Id and text of each line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} isn't there.")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, text = line.strip().partition(" ")
        if not name:
            raise ValueError(f"{path}:{number} is empty: each line is an id and a text.")
        pairs.append((name, text.strip()))
    if not pairs:
        raise ValueError(f"{path} has no lines.")
    return pairs
