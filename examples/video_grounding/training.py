"""Prediction, and how good it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score
from transformers import Trainer

from .features import IGNORED


Examples = list[dict[str, Any]]


def predict(trainer: Trainer, examples: Examples) -> list[np.ndarray]:
    """The saliency of every clip of every example, logits `(clips,)` each; by all processes together."""
    logits, labels, _ = trainer.predict(examples)  # type: ignore[arg-type]
    return [row[label != IGNORED] for row, label in zip(logits, labels, strict=True)]


def grounding_metrics(saliency: list[np.ndarray], examples: Examples) -> dict[str, float]:
    """Mean over the queries, in per cent.

    `mAP` is the average precision of the clips ranked by saliency, `hit@1` how often the first one is relevant.
    Queries without a relevant clip don't count.
    """
    pairs = [(s, e["labels"].numpy()) for s, e in zip(saliency, examples, strict=True) if e["labels"].any()]
    return {
        "mAP": 100 * float(np.mean([average_precision_score(labels, scores) for scores, labels in pairs])),
        "hit@1": 100 * float(np.mean([labels[scores.argmax()] for scores, labels in pairs])),
    }
