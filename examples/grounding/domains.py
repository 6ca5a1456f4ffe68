"""Sets that are split by domain, one model each: which videos are in a domain's splits, and ranking their clips."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from .files import read_json


def read_split(path: Path, domain: str, split: str, known: set[str]) -> list[str]:
    """The videos of a domain's split.

    Args:
        path: a JSON file, `{"dog": {"train": [ids], "val": [ids]}, ...}`.
        domain: one of its domains.
        split: `"train"` or `"val"`.
        known: videos that have annotations. Those of the split that haven't are left out, with a warning.

    Raises:
        FileNotFoundError: if the file isn't there.
        ValueError: if it has no such domain or split, or no video of the split is known.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} isn't there: the splits of each domain, which UMT has in datasets/utils/static.py, as JSON: "
            '{"domain": {"train": [ids], "val": [ids]}}.'
        )
    splits = read_json(path)
    if domain not in splits:
        raise ValueError(f"{path} has no domain {domain!r}, but {', '.join(map(repr, sorted(splits)))}.")
    wanted = splits[domain].get(split) if isinstance(splits[domain], dict) else None
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"{path}: domain {domain!r} has no list {split!r} of video ids.")
    found = [name for name in wanted if name in known]
    if not found:
        raise ValueError(f"{path}: no video of {domain!r}, {split!r} has annotations.")
    if len(found) < len(wanted):
        missing = ", ".join(sorted(set(wanted) - known)[:5])
        warnings.warn(
            f"{path}: {len(wanted) - len(found)} of {len(wanted)} videos of {domain!r}, {split!r} have no annotations "
            f"and are left out: {missing}.",
            stacklevel=2,
        )
    return found


def trapezoid_precision(scores: np.ndarray, positive: np.ndarray, first: int | None = None) -> float:
    """Area under precision over recall by trapezoids, from precision 1 at recall 0, as UMT computes it; from 0 to 1.

    Args:
        scores: `(clips,)`; of equal ones, the first ranks first.
        positive: `(clips,)`, bool.
        first: how many ranks count, with recall relative to the positives among them; all by default.

    Returns:
        0 where nothing is positive.
    """
    ranked = positive[np.argsort(-scores, kind="stable")][:first].astype(float)
    if not ranked.any():
        return 0.0
    recall = np.append(0.0, ranked.cumsum() / ranked.sum())
    precision = np.append(1.0, ranked.cumsum() / np.arange(1, len(ranked) + 1))
    return float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())
