"""The metrics of QVHighlights, as its own script computes them: moment retrieval and highlight detection.

Everything is in per cent, rounded to two decimals as there. Input at which that script stops with an accident of
Python is an error here that says what is wrong; for two kinds, which the docstrings name, there is a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


CLIP_SECONDS = 2
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # as literals: on a grid, exact hits are common
# Lengths of true windows in seconds, above the first and up to the second; None: all windows, whatever their length.
LENGTHS: dict[str, tuple[float, float] | None] = {
    "short": (0, 10),
    "middle": (10, 30),
    "long": (30, 150),
    "full": None,
}
SCORED_WINDOWS = 10
POSITIVE_FROM = {"Fair": 2, "Good": 3, "VeryGood": 4}  # the lowest score, of 0 to 4, of a clip that is a highlight
WORKERS = 3

Record = Mapping[str, Any]


def moment_retrieval_metrics(predictions: Sequence[Record], ground_truth: Sequence[Record]) -> dict[str, float]:
    """How well predicted windows find the moments that queries mean.

    Average precision is taken of each query and averaged over queries. Of a query, the first ten windows in their
    order count, ranked by their scores (of equal scores, the first is first). Each takes the free true window with
    which its IoU is highest, if that reaches the threshold. R1 looks at the first window in its order, whatever its
    score. In a range of lengths, true windows of other lengths are left out, and queries that have no others.

    Args:
        predictions: one dict a query, with `qid` and `pred_relevant_windows`, `[[start, end, score], ...]` in seconds,
            which may be empty: that counts 0. (The benchmark's script stops there.)
        ground_truth: one dict a query, with `qid` and `relevant_windows`, `[[start, end], ...]` in seconds.

    Returns:
        `MR-full-mAP`, `MR-short-mAP`, `MR-middle-mAP`, `MR-long-mAP`: means over IoU thresholds from 0.5 to 0.95;
        `MR-full-mAP@0.5`, `MR-full-mAP@0.75`, `MR-full-R1@0.5`, `MR-full-R1@0.7`. A range of lengths in which no true
        window lies is NaN. (The benchmark's script stops there.)

    Raises:
        ValueError: if the two don't have the same queries, or a record lacks what is named above.
    """
    predicted, true = _matched(predictions, ground_truth)
    windows = {qid: _predicted_windows(record) for qid, record in predicted.items()}
    wanted = {qid: _true_windows(record) for qid, record in true.items()}
    result = {}
    for name, length in LENGTHS.items():
        inside = wanted if length is None else {qid: _of_length(w, *length) for qid, w in wanted.items()}
        precisions = np.array([_average_precisions(windows[q], w) for q, w in inside.items() if len(w)])
        by_threshold = precisions.mean(0) if len(precisions) else np.full(len(THRESHOLDS), np.nan)
        result[f"MR-{name}-mAP"] = _per_cent(by_threshold.mean())
        if name == "full":
            for threshold in (0.5, 0.75):
                result[f"MR-full-mAP@{threshold}"] = _per_cent(by_threshold[THRESHOLDS.index(threshold)])
    best = np.array([_first_overlap(windows[qid], wanted[qid]) for qid in predicted])
    for threshold in (0.5, 0.7):
        result[f"MR-full-R1@{threshold}"] = _per_cent((best >= threshold).mean())
    return result


def highlight_metrics(predictions: Sequence[Record], ground_truth: Sequence[Record]) -> dict[str, float]:
    """How well predicted saliency finds the clips that three people rated highly.

    A clip is a highlight for a person who gave it at least 2 (`Fair`), 3 (`Good`) or 4 (`VeryGood`); clips that nobody
    rated have 0. `mAP` is a mean over queries and persons: 0 for a person without any highlight, the mean, over the
    steps at which recall grows, of the best precision there or later for all others; clips of equal scores are one
    step. `Hit1` is the share of queries whose clip of the highest score is a highlight for anybody. There are
    `duration` // 2 clips. For mAP, scores beyond are cut off and missing ones are 0; Hit1 looks at the scores as they
    are, and a clip beyond is none.

    Args:
        predictions: one dict a query, with `qid` and `pred_saliency_scores`, one number for each clip of two seconds.
        ground_truth: one dict a query, with `qid`, `duration` in seconds, `relevant_clip_ids` and `saliency_scores`,
            three for each of these clips.

    Returns:
        `HL-min-Fair-mAP`, `HL-min-Fair-Hit1`, and the same for `Good` and `VeryGood`.

    Raises:
        ValueError: if the two don't have the same queries, or a record lacks what is named above.
    """
    predicted, true = _matched(predictions, ground_truth)
    scores = {qid: _saliency(record) for qid, record in predicted.items()}
    ratings = {qid: _ratings(true[qid]) for qid in predicted}
    result = {}
    for name, lowest in POSITIVE_FROM.items():
        precisions, hits = [], []
        for qid, values in scores.items():
            highlights = ratings[qid] >= lowest
            fitted = np.zeros(len(highlights))
            fitted[: len(values)] = values[: len(highlights)]
            precisions += [_saliency_precision(fitted, highlights[:, worker]) for worker in range(WORKERS)]
            best = int(values.argmax())
            hits.append(best < len(highlights) and highlights[best].any())
        result[f"HL-min-{name}-mAP"] = _per_cent(np.mean(precisions))
        result[f"HL-min-{name}-Hit1"] = _per_cent(np.mean(hits))
    return result


def interval_overlap(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of an interval `(2,)` with each of others `(n, 2)`: `(n,)`; 0 where they don't overlap."""
    common = np.minimum(one[1], others[:, 1]) - np.maximum(one[0], others[:, 0])
    either = (one[1] - one[0]) + (others[:, 1] - others[:, 0]) - common
    return np.divide(common, either, out=np.zeros(len(others)), where=(common > 0) & (either > 0))


def interpolated_precision(hits: np.ndarray, positives: int) -> float:
    """Area under the envelope of a ranking's precision over its recall.

    Args:
        hits: `(ranks,)`, true where something is found, the best rank first.
        positives: how much there is to find.
    """
    found = hits.cumsum()
    precision = np.append(found / np.arange(1, len(hits) + 1), 0.0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1][:-1]
    return float((envelope * hits).sum() / positives)


def _average_precisions(windows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of one query, at each threshold; `windows (n, 3)`, `wanted (m, 2)`."""
    ranked = windows[:SCORED_WINDOWS]
    ranked = ranked[np.argsort(-ranked[:, 2], kind="stable")]
    overlaps = [interval_overlap(window, wanted) for window in ranked]
    # Of true windows with the same IoU the benchmark's script takes the last.
    orders = [np.argsort(overlap, kind="stable")[::-1] for overlap in overlaps]
    precisions = []
    for threshold in THRESHOLDS:
        hits, taken = np.zeros(len(ranked), dtype=bool), np.zeros(len(wanted), dtype=bool)
        for rank, (overlap, order) in enumerate(zip(overlaps, orders, strict=True)):
            free = [index for index in order if overlap[index] >= threshold and not taken[index]]
            if free:
                hits[rank] = taken[free[0]] = True
        precisions.append(interpolated_precision(hits, len(wanted)))
    return np.array(precisions)


def _first_overlap(windows: np.ndarray, wanted: np.ndarray) -> float:
    """The first window's IoU with the true window that it fits best; of equal ones, the first."""
    if not len(windows):
        return 0.0
    start, end = windows[0, :2]
    true_start, true_end = wanted[interval_overlap(windows[0], wanted).argmax()]
    common, hull = min(end, true_end) - max(start, true_start), max(end, true_end) - min(start, true_start)
    # The hull of two intervals that overlap is their union, but here its rounding differs from `interval_overlap`'s.
    return float(common / hull) if common > 0 else 0.0


def _of_length(windows: np.ndarray, above: float, up_to: float) -> np.ndarray:
    lengths = windows[:, 1] - windows[:, 0]
    return windows[(lengths > above) & (lengths <= up_to)]


def _saliency_precision(scores: np.ndarray, highlights: np.ndarray) -> float:
    """Mean over the steps at which recall grows; clips of equal scores are one step."""
    if not highlights.any():
        return 0.0
    if highlights.all():
        return 1.0
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = highlights[order].cumsum()[ends]
    envelope = np.maximum.accumulate((found / (ends + 1))[::-1])[::-1]
    return float(envelope[np.diff(found, prepend=0) > 0].mean())


def _per_cent(share: float) -> float:
    return float(f"{100 * share:.2f}")


def _matched(predictions: Sequence[Record], truth: Sequence[Record]) -> tuple[dict[Any, Record], dict[Any, Record]]:
    """Both by query."""
    predicted, true = _by_query(predictions, "predictions"), _by_query(truth, "ground truth")
    if not true:
        raise ValueError("The ground truth is empty.")
    for name, missing in (("prediction", true.keys() - predicted.keys()), ("truth", predicted.keys() - true.keys())):
        if missing:
            some = ", ".join(sorted(map(repr, missing))[:5])
            raise ValueError(
                f"{len(missing)} queries have no {name}, such as qid {some}: predictions and ground truth must have "
                "the same queries."
            )
    return predicted, true


def _by_query(records: Iterable[Record], what: str) -> dict[Any, Record]:
    by_query: dict[Any, Record] = {}
    for number, record in enumerate(records):
        if "qid" not in record:
            raise ValueError(f"Record {number} of the {what} has no 'qid'.")
        if record["qid"] in by_query:
            raise ValueError(f"The {what} have qid {record['qid']!r} twice.")
        by_query[record["qid"]] = record
    return by_query


def _field(record: Record, name: str) -> Any:
    if record.get(name) is None:
        raise ValueError(f"qid {record['qid']!r} has no {name!r}.")
    return record[name]


def _numbers(record: Record, name: str, columns: int | None) -> np.ndarray:
    """A field's numbers, float64, `(n, columns)` or `(n,)`."""
    value = _field(record, name)
    wanted = "a list of numbers" if columns is None else f"a list of lists of {columns} numbers"
    try:
        rows = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"qid {record['qid']!r}: {name!r} must be {wanted}.") from error
    if not rows.size:
        rows = rows.reshape(0) if columns is None else rows.reshape(0, columns)
    if rows.ndim != (1 if columns is None else 2) or (columns is not None and rows.shape[1] != columns):
        raise ValueError(f"qid {record['qid']!r}: {name!r} must be {wanted}, got shape {rows.shape}.")
    if not np.isfinite(rows).all():
        raise ValueError(f"qid {record['qid']!r}: {name!r} has numbers that aren't finite.")
    return rows


def _predicted_windows(record: Record) -> np.ndarray:
    return _numbers(record, "pred_relevant_windows", 3)


def _true_windows(record: Record) -> np.ndarray:
    windows = _numbers(record, "relevant_windows", 2)
    if not len(windows) or (windows[:, 0] >= windows[:, 1]).any():
        raise ValueError(f"qid {record['qid']!r}: 'relevant_windows' must be some [start, end] with start < end.")
    return windows


def _saliency(record: Record) -> np.ndarray:
    scores = _numbers(record, "pred_saliency_scores", None)
    if not len(scores):
        raise ValueError(f"qid {record['qid']!r}: 'pred_saliency_scores' is empty.")
    return scores


def _ratings(record: Record) -> np.ndarray:
    """`(clips, persons)`."""
    clips, scores = _field(record, "relevant_clip_ids"), _numbers(record, "saliency_scores", WORKERS)
    ratings = np.zeros((int(_field(record, "duration") / CLIP_SECONDS), WORKERS))
    if len(clips) != len(scores):
        raise ValueError(
            f"qid {record['qid']!r} has {len(clips)} 'relevant_clip_ids' and {len(scores)} rows of 'saliency_scores'."
        )
    for clip, row in zip(clips, scores, strict=True):
        if not 0 <= clip < len(ratings):
            raise ValueError(f"qid {record['qid']!r}: clip {clip} isn't among the {len(ratings)} of its duration.")
        ratings[clip] = row
    return ratings
