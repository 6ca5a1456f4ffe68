"""TVSum in UMT's layout: how important twenty people find the clips of a video of a domain (VT, VU, ...).

    tvsum_anno.json, tvsum_splits.json
    video_features/{id}_rgb.npy, video_features/{id}_opt.npy, audio_features/{id}.npy, query_features/{id}.npz

Clips are 2 s long; the sentence is the video's title. The splits are those of UMT, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .domains import read_split, trapezoid_precision
from .files import Sample, Source, read_json, read_video
from .youtube_highlights import AUDIO, VIDEO


ANNOTATIONS, SPLITS = "tvsum_anno.json", "tvsum_splits.json"
TEXT = Source("query_features/{name}.npz", 512, "token")
CLIP_SECONDS = 2
ANNOTATORS = 20
LOWEST, HIGHEST = 1, 5
RANKS = 5


def read_tvsum(
    folder: Path, domain: str, split: str, video: Sequence[Source] = (*VIDEO, AUDIO), text: Source = TEXT
) -> list[Sample]:
    """The videos of a domain's split with their features, as UMT prepares them: as they are, cut to the shortest.

    The saliency of a clip is its mean importance, from 0 to 1.

    Args:
        folder: holds annotations, splits and the folders of features.
        domain: a domain of the splits.
        split: `"train"` or `"val"`.
        video: sources of each clip.
        text: of each token of the title.

    Raises:
        FileNotFoundError: if a file isn't there.
        ValueError: if one isn't as above; the message says which, and of which video.
    """
    path = folder / ANNOTATIONS
    records = read_json(path)
    samples = []
    for name in read_split(folder / SPLITS, domain, split, set(records)):
        line = f"{path}, video {name!r}"
        importance = _importance(records[name], line)
        features, importance = read_video(video, folder, name, line, labels=importance)
        saliency = (importance.mean(1) - LOWEST) / (HIGHEST - LOWEST)
        seconds = float(CLIP_SECONDS * len(importance))
        words = text.read(folder, name, line)
        truth = {"importance": importance.tolist()}
        samples.append(Sample(name, line, features, seconds, words, saliency=saliency, truth=truth))
    return samples


def tvsum_top5_map(
    scores: Mapping[str, Sequence[float]], importance: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, float]:
    """Mean over annotators and a domain's videos of the average precision of the first five clips, in per cent.

    As UMT computes it: a clip is positive for an annotator who finds it more important than the median of the video's
    clips (of an even number, the lower of the middle two), and recall is relative to the positives among the five.

    Args:
        scores: of each video, one number a clip.
        importance: of each video, `(clips, annotators)`.

    Returns:
        `mAP@5`. A table's average is the plain mean over the domains.

    Raises:
        ValueError: if the two don't have the same videos and clips.
    """
    if not importance or scores.keys() != importance.keys():
        raise ValueError("Scores and importance must be of the same videos.")
    precisions = []
    for name, rows in importance.items():
        ranked, rated = np.asarray(scores[name], dtype=float), np.asarray(rows, dtype=float)
        if ranked.shape != rated.shape[:1]:
            raise ValueError(f"Video {name!r} has {len(ranked)} scores and {len(rated)} clips.")
        median = np.sort(rated, axis=0)[(len(rated) - 1) // 2]
        precisions += [trapezoid_precision(ranked, column, RANKS) for column in (rated > median).T]
    return {"mAP@5": 100 * float(np.mean(precisions))}


def _importance(record: Any, line: str) -> np.ndarray:
    """`(clips, annotators)`, float32."""
    rows = record.get("anno") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{line}: `anno` must have a row for each clip.")
    for clip, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != ANNOTATORS or not all(_is_importance(value) for value in row):
            raise ValueError(f"{line}: clip {clip} of `anno` must be {ANNOTATORS} numbers from 1 to 5, got {row!r}.")
    return np.array(rows, dtype=np.float32)


def _is_importance(value: Any) -> bool:
    return isinstance(value, (int, float)) and LOWEST <= value <= HIGHEST
