"""Prediction, and how good it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from .features import Collator


Examples = list[dict[str, Any]]
INPUTS = ("input_ids", "attention_mask", "frame_features", "frame_mask")


@torch.inference_mode()
def predict(model: nn.Module, examples: Examples, collator: Collator, batch_size: int = 50) -> list[np.ndarray]:
    """The saliency of every clip of every example, logits `(clips,)` each."""
    model.eval()
    device = next(model.parameters()).device
    saliency = []
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        logits = model(**{name: batch[name].to(device) for name in INPUTS}).logits
        saliency += [row[mask].numpy() for row, mask in zip(logits.cpu(), batch["frame_mask"], strict=True)]
    return saliency


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
