"""YouTube Highlights in UMT's layout: which clips of a video of a domain (dog, gymnastics, ...) are highlights.

    youtube_anno.json, youtube_splits.json
    video_features/{id}_rgb.npy, video_features/{id}_opt.npy, audio_features/{id}.npy

Clips are 100 frames long and overlap by half. There are no sentences. The splits are those of UMT, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .domains import read_split, trapezoid_precision
from .files import Sample, Source, read_json, read_video


ANNOTATIONS, SPLITS = "youtube_anno.json", "youtube_splits.json"
VIDEO = (Source("video_features/{name}_rgb.npy", 1024, None), Source("video_features/{name}_opt.npy", 1024, None))
AUDIO = Source("audio_features/{name}.npy", 2048, None)


def read_youtube_highlights(
    folder: Path, domain: str, split: str, video: Sequence[Source] = (*VIDEO, AUDIO)
) -> list[Sample]:
    """The videos of a domain's split with their features, as UMT prepares them: as they are, cut to the shortest.

    A clip is a highlight if its `match` is above 0; borderline clips (0) aren't.

    Args:
        folder: holds annotations, splits and the folders of features.
        domain: a domain of the splits.
        split: `"train"` or `"val"`.
        video: sources of each clip.

    Raises:
        FileNotFoundError: if a file isn't there.
        ValueError: if one isn't as above; the message says which, and of which video.
    """
    path = folder / ANNOTATIONS
    records = read_json(path)
    samples = []
    for name in read_split(folder / SPLITS, domain, split, set(records)):
        line = f"{path}, video {name!r}"
        match = _match(records[name], line)
        features, match = read_video(video, folder, name, line, labels=match)
        truth = {"labels": (match > 0).astype(int).tolist()}
        seconds = _seconds(records[name], len(match), line)
        saliency = (match > 0).astype(np.float32)
        samples.append(Sample(name, line, features, seconds, saliency=saliency, truth=truth))
    return samples


def youtube_highlights_map(
    scores: Mapping[str, Sequence[float]], labels: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Mean over a domain's videos of the average precision of their clips, as UMT computes it, in per cent.

    Args:
        scores: of each video, one number a clip.
        labels: of each video, 1 for highlights, else 0. A video without any counts 0.

    Returns:
        `mAP`. A table's average is the plain mean over the domains.

    Raises:
        ValueError: if the two don't have the same videos and clips.
    """
    if not labels or scores.keys() != labels.keys():
        raise ValueError("Scores and labels must be of the same videos.")
    precisions = []
    for name, wanted in labels.items():
        ranked, positive = np.asarray(scores[name], dtype=float), np.asarray(wanted) > 0
        if ranked.shape != positive.shape:
            raise ValueError(f"Video {name!r} has {len(ranked)} scores and {len(positive)} labels.")
        precisions.append(trapezoid_precision(ranked, positive))
    return {"mAP": 100 * float(np.mean(precisions))}


def _match(record: Any, line: str) -> np.ndarray:
    match = record.get("match") if isinstance(record, dict) else None
    if not isinstance(match, list) or not match or not all(value in (-1, 0, 1) for value in match):
        raise ValueError(f"{line}: `match` must be one of -1, 0, 1 for each clip, got {match!r}.")
    return np.array(match, dtype=np.float32)


def _seconds(record: dict[str, Any], clips: int, line: str) -> float:
    """Length of the video: `frames` / `fps`, where they are there, else in clips."""
    frames, rate = record.get("frames"), record.get("fps")
    if frames is None or rate is None:
        return float(clips)
    if not isinstance(frames, (int, float)) or not isinstance(rate, (int, float)) or frames <= 0 or rate <= 0:
        raise ValueError(f"{line}: `frames` and `fps` must be positive numbers, got {frames!r} and {rate!r}.")
    return frames / rate
