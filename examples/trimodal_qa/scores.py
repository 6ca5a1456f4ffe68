"""How well the answers of frames are found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common.training import Collate
from sklearn.metrics import f1_score
from torch import nn

from .inputs import Example


THRESHOLDS = np.arange(0.05, 1, 0.05)


@torch.inference_mode()
def predict(
    model: nn.Module, examples: Sequence[Example], collator: Collate, batch_size: int = 50
) -> list[np.ndarray]:
    """Probability of every answer, and of none, which comes last: `(frames, answers + 1)` for each example."""
    model.eval()
    device = next(model.parameters()).device
    probabilities = []
    for start in range(0, len(examples), batch_size):
        part = list(examples[start : start + batch_size])
        batch = {name: values.to(device) for name, values in collator(part).items() if name != "labels"}
        output = model(**batch)["logits"].float().softmax(-1).cpu()
        probabilities += [row[: len(each["labels"])].numpy() for row, each in zip(output, part, strict=True)]
    return probabilities


def decide(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """The best answer of each frame, where the probability that there is one exceeds `threshold`; else none, the last.

    Args:
        probabilities: `(frames, answers + 1)`.
        threshold: between 0 and 1.

    Returns:
        `(frames,)`.
    """
    none = probabilities.shape[-1] - 1
    return np.where(1 - probabilities[:, none] > threshold, probabilities[:, :none].argmax(-1), none)


def micro_f1(probabilities: Sequence[np.ndarray], examples: Sequence[Example], threshold: float) -> float:
    """F1 of all pairs of a frame and its answer, in per cent: a frame without an answer counts for nothing."""
    labels = np.concatenate([example["labels"].numpy() for example in examples])
    decided = np.concatenate([decide(each, threshold) for each in probabilities])
    answers = range(probabilities[0].shape[-1] - 1)
    return 100 * float(f1_score(labels, decided, labels=list(answers), average="micro", zero_division=0.0))


def choose_threshold(probabilities: Sequence[np.ndarray], examples: Sequence[Example]) -> float:
    """The threshold with the best F1."""
    return float(max(THRESHOLDS, key=lambda threshold: micro_f1(probabilities, examples, threshold)))
