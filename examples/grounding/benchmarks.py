"""The benchmarks that a recipe can name: how each is read, and how predictions are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .charades_sta import SOURCES, charades_recall, read_charades_sta
from .files import Sample
from .metrics import highlight_metrics, moment_retrieval_metrics
from .qvhighlights import prediction, read_qvhighlights
from .training import Prediction
from .tvsum import read_tvsum, tvsum_top5_map
from .youtube_highlights import read_youtube_highlights, youtube_highlights_map


Score = Callable[[Sequence[Sample], Sequence[Prediction]], dict[str, float]]


@dataclass(frozen=True)
class Benchmark:
    """A set of videos with what is predicted of them.

    Attributes:
        read: the samples of a split: takes the data folder, the split, the domain ("" without domains) and options.
        score: the benchmark's metrics, in per cent.
        moments: whether moments are predicted, or saliency alone.
    """

    read: Callable[..., list[Sample]]
    score: Score
    moments: bool


def _read_charades(folder: Path, split: str, domain: str, features: str = "va", **options: Any) -> list[Sample]:
    if features not in SOURCES:
        raise ValueError(f"`features` of Charades-STA must be one of {', '.join(map(repr, SOURCES))}.")
    return read_charades_sta(folder, split, SOURCES[features], **options)


def _score_qvhighlights(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    lines = submission(samples, predictions)
    truth = [sample.truth for sample in samples]
    return moment_retrieval_metrics(lines, truth) | highlight_metrics(lines, truth)


def submission(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """QVHighlights' lines of predictions."""
    pairs = zip(samples, predictions, strict=True)
    return [prediction(sample, predicted.windows, predicted.saliency) for sample, predicted in pairs]


def _score_youtube(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    labels = {sample.name: sample.truth["labels"] for sample in samples}
    return youtube_highlights_map(_saliency(samples, predictions), labels)


def _score_tvsum(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    importance = {sample.name: sample.truth["importance"] for sample in samples}
    return tvsum_top5_map(_saliency(samples, predictions), importance)


def _score_charades(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, float]:
    windows = {sample.name: each.windows for sample, each in zip(samples, predictions, strict=True)}
    return charades_recall(windows, {sample.name: sample.truth["window"] for sample in samples})


def _saliency(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {sample.name: each.saliency for sample, each in zip(samples, predictions, strict=True)}


BENCHMARKS = {
    "qvhighlights": Benchmark(
        lambda folder, split, domain, **options: read_qvhighlights(folder, split, **options),
        _score_qvhighlights,
        moments=True,
    ),
    "youtube_highlights": Benchmark(
        lambda folder, split, domain, **options: read_youtube_highlights(folder, domain, split, **options),
        _score_youtube,
        moments=False,
    ),
    "tvsum": Benchmark(
        lambda folder, split, domain, **options: read_tvsum(folder, domain, split, **options),
        _score_tvsum,
        moments=False,
    ),
    "charades_sta": Benchmark(_read_charades, _score_charades, moments=True),
}
