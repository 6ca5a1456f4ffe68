"""The loss of a classifier, whatever its labels are and wherever there are none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


IGNORED = -100


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean loss over all that has a label.

    Args:
        logits: `(..., labels)`.
        labels: `(...)` of classes, integers; or `(..., labels)` of 0 and 1, or of numbers; of a single number,
            `(...)` will do. -100 is no label.
        problem_type: `"single_label_classification"`: cross-entropy; `"multi_label_classification"`: binary
            cross-entropy; `"regression"`: mean squared error. None: regression for one logit, else by the type of the
            labels.
        mask: `(...)`, bool, false where labels don't count; None where all do.

    Returns:
        A scalar; 0 if there are no labels.

    Raises:
        ValueError: if labels don't have the shape of the logits.
    """
    if problem_type is None:
        integers = not (labels.is_floating_point() or labels.dtype.is_complex)
        single = integers and logits.shape[-1] > 1 and labels.shape == logits.shape[:-1]
        several = "regression" if logits.shape[-1] == 1 else "multi_label_classification"
        problem_type = "single_label_classification" if single else several
    classes = problem_type == "single_label_classification"
    if not classes and labels.shape == logits.shape[:-1] and logits.shape[-1] == 1:
        labels = labels[..., None]
    expected = logits.shape[:-1] if classes else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"Labels for {problem_type} must have the shape {tuple(expected)}, got {tuple(labels.shape)}."
        )
    counted = labels != IGNORED
    if mask is not None:
        counted = counted & (mask if classes else mask[..., None])
    logits = logits.float()
    if classes:
        targets = labels.masked_fill(~counted, 0).flatten()
        loss = F.cross_entropy(logits.flatten(0, -2), targets, reduction="none").view_as(labels)
    else:
        targets = labels.to(logits.dtype).masked_fill(~counted, 0.0)
        of_each = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
        loss = of_each(logits, targets, reduction="none")
    return loss.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
