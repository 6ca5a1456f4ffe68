"""QVHighlights in Moment-DETR's layout: moments and highlights that a sentence means.

    highlight_train_release.jsonl, highlight_val_release.jsonl, highlight_test_release.jsonl
    slowfast_features/{vid}.npz, clip_features/{vid}.npz, clip_text_features/qid{qid}.npz

A line has `qid`, `query`, `duration` and `vid`, and, where the truth is known, `relevant_windows` in seconds,
`relevant_clip_ids` of clips of two seconds and, for each of these, three people's `saliency_scores` from 0 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import Sample, Source, of_length_one, read_json_lines, read_video, spans_of
from .metrics import CLIP_SECONDS, WORKERS


ANNOTATIONS = "highlight_{split}_release.jsonl"
VIDEO = (Source("slowfast_features/{name}.npz", 2304), Source("clip_features/{name}.npz", 512))
TEXT = Source("clip_text_features/qid{name}.npz", 512, "last_hidden_state")
MOST_CLIPS, MOST_TOKENS = 75, 32
EPSILON = 1e-5
HIGHEST_SCORE = 4


def read_qvhighlights(
    folder: Path, split: str, video: Sequence[Source] = VIDEO, text: Source = TEXT, annotations: str = ANNOTATIONS
) -> list[Sample]:
    """The queries of a split with their features, as Moment-DETR prepares them.

    Each source is cut to 75 clips (or 32 tokens) and its rows scaled to length 1; a video's sources are cut to the
    shortest and put side by side, with where each clip starts and ends. The saliency of a clip is the sum of its three
    scores over 12 (UMT's target).

    Args:
        folder: holds the annotations and the folders of features.
        split: `"train"`, `"val"`, `"test"`, or what else `annotations` is a file of.
        video: of each clip of two seconds.
        text: of each token of a query.
        annotations: the file of a split, with `{split}`.

    Raises:
        FileNotFoundError: if the annotations, or features that they name, aren't there.
        ValueError: if a line or a file isn't as above; the message says which.
    """
    path = folder / annotations.format(split=split)
    samples, seen = [], {}
    for entry, line in read_json_lines(path):
        check_query(entry, line)
        if entry["qid"] in seen:
            raise ValueError(f"{line}: qid {entry['qid']} is in {seen[entry['qid']]} already.")
        seen[entry["qid"]] = line
        ratings = _ratings(entry)
        features, ratings = read_video(
            video, folder, entry["vid"], line, labels=ratings, most=MOST_CLIPS, epsilon=EPSILON, endpoints=True
        )
        known = "relevant_windows" in entry
        samples.append(
            Sample(
                entry["qid"],
                line,
                features,
                float(entry["duration"]),
                of_length_one(text.read(folder, str(entry["qid"]), line)[:MOST_TOKENS], EPSILON),
                # As Moment-DETR: shares of the clips in training, of the duration when moments are predicted.
                spans_of(entry["relevant_windows"], CLIP_SECONDS * len(features)) if known else None,
                ratings.sum(1) / (WORKERS * HIGHEST_SCORE) if "saliency_scores" in entry else None,
                entry,
            )
        )
    return samples


def check_query(entry: dict[str, Any], line: str) -> None:
    """Raise a `ValueError` that names the line unless it is as described above."""
    for name, kind in {"qid": int, "query": str, "vid": str, "duration": (int, float)}.items():
        value = entry.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise ValueError(f"{line}: field {name!r} is missing or no {_kind(kind)}: {value!r}.")
    if not entry["duration"] > 0:
        raise ValueError(f"{line}: `duration` must be positive, got {entry['duration']!r}.")
    if "relevant_windows" in entry:
        windows = entry["relevant_windows"]
        if not isinstance(windows, list) or not windows or not all(map(_is_window, windows)):
            raise ValueError(f"{line}: `relevant_windows` must be pairs of seconds [start, end]: {windows!r}.")
    clips, scores = entry.get("relevant_clip_ids"), entry.get("saliency_scores")
    if scores is None:
        return
    count = int(entry["duration"] / CLIP_SECONDS)
    if not isinstance(clips, list) or not all(isinstance(clip, int) and 0 <= clip < count for clip in clips):
        raise ValueError(
            f"{line}: `relevant_clip_ids` must be numbers of clips from 0 to {count - 1}, for a duration of "
            f"{entry['duration']} s: {clips!r}."
        )
    if not isinstance(scores, list) or len(scores) != len(clips):
        raise ValueError(f"{line}: `saliency_scores` must have a row for each of {len(clips)} `relevant_clip_ids`.")
    for row in scores:
        if not isinstance(row, list) or len(row) != WORKERS or not all(s in range(HIGHEST_SCORE + 1) for s in row):
            raise ValueError(f"{line}: a row of `saliency_scores` must be {WORKERS} scores from 0 to 4: {row!r}.")


def prediction(sample: Sample, windows: np.ndarray, saliency: np.ndarray) -> dict[str, Any]:
    """A line of a submission: windows cut to the 150 s of the set and rounded to its clips, the best first.

    Args:
        sample: the query.
        windows: `(n, 3)`: start and end in seconds, and a score.
        saliency: `(clips,)`.
    """
    ranked = windows[np.argsort(-windows[:, 2], kind="stable")].astype(float)
    ranked[:, :2] = CLIP_SECONDS * np.round(ranked[:, :2].clip(0, CLIP_SECONDS * MOST_CLIPS) / CLIP_SECONDS)
    return {
        "qid": sample.name,
        "query": sample.truth["query"],
        "vid": sample.truth["vid"],
        "pred_relevant_windows": [[round(number, 4) for number in row] for row in ranked.tolist()],
        "pred_saliency_scores": [round(number, 4) for number in saliency.tolist()],
    }


def _ratings(entry: dict[str, Any]) -> np.ndarray:
    """`(clips, 3)`, float32; clips that nobody rated have 0."""
    ratings = np.zeros((int(entry["duration"] / CLIP_SECONDS), WORKERS), dtype=np.float32)
    if entry.get("relevant_clip_ids") and "saliency_scores" in entry:
        ratings[entry["relevant_clip_ids"]] = entry["saliency_scores"]
    return ratings


def _is_window(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(second, (int, float)) for second in value)
        and 0 <= value[0] < value[1]
    )


def _kind(kind: Any) -> str:
    return {int: "integer", str: "text"}.get(kind, "number")
