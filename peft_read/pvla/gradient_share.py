"""A weight of the alignment by its share of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


# Steps between two measurements of the weight.
WEIGH_EVERY = 10


class GradientShare:
    """The weight at which the alignment's gradient has a set share of the task's, measured anew every 10 steps.

    Attributes:
        share: size of the alignment's gradient over the task's.
        weight: the one measured last; None before there is one.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.weight: float | None = None
        self._measured_at = -1

    def resume(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Take the last weight from a log, which travels with a checkpoint, unless there is one."""
        if self.weight is None:
            logged = [entry["pvla_weight"] for entry in log_history if "pvla_weight" in entry]
            self.weight = logged[-1] if logged else None

    def is_due(self, step: int) -> bool:
        """Whether it is time to measure."""
        return self._measured_at != step and (step % WEIGH_EVERY == 0 or self.weight is None)

    def measure(self, step: int, norms: Tensor) -> bool:
        """Set the weight by the gradients' norms, `(task, alignment)`; whether there is a new one.

        There is none where nothing is aligned in the batch, or a loss overflows.
        """
        weight = self.share * (norms[0] / norms[1]).item()
        if not math.isfinite(weight):
            return False
        self._measured_at, self.weight = step, weight
        return True


def gradient_norms(
    task: Tensor, alignment: Tensor, parameters: Sequence[nn.Parameter], only_reached: bool
) -> Tensor | None:
    """Norms of the two losses' gradients on some parameters, `(2,)`; their graph stays for the backward pass.

    Each loss is derived once, whatever it reaches: over devices, negatives make a collective call of it.

    Args:
        task: a scalar.
        alignment: likewise.
        parameters: that are trained.
        only_reached: whether only those count that the alignment reaches.

    Returns:
        None if a loss reaches none of them.
    """
    if not (task.requires_grad and alignment.requires_grad):
        return None
    of_task, of_alignment = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (task, alignment)
    )
    counts = [not only_reached or gradient is not None for gradient in of_alignment]
    norms = []
    for gradients in (of_task, of_alignment):
        sizes = [g.float().norm() for g, each in zip(gradients, counts, strict=True) if each and g is not None]
        if not sizes:
            return None
        norms.append(torch.stack(sizes).norm())
    return torch.stack(norms)


def compared_parameters(model: nn.Module, before_blocks: bool) -> list[nn.Parameter]:
    """The trained parameters on which gradients are compared: READ's; all where states come from before blocks."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    read = [] if before_blocks else [p for name, p in trained.items() if ".read_" in name]
    return read or list(trained.values())
