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


def gradient_norms(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Norm of each loss's gradient on some parameters, `(losses,)`; their graph stays for the backward pass.

    None if one reaches none of them.
    """
    norms = []
    for loss in losses:
        if not loss.requires_grad or not parameters:
            return None
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        sizes = [g.float().norm() for g in gradients if g is not None]
        if not sizes:
            return None
        norms.append(torch.stack(sizes).norm())
    return torch.stack(norms)


def compared_parameters(model: nn.Module, alignment: Tensor, before_blocks: bool) -> list[nn.Parameter]:
    """The trained parameters on which gradients are compared.

    READ's weights, else all; where states come from before the blocks, those that the alignment reaches.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not before_blocks:
        return [p for name, p in trained.items() if ".read_" in name] or list(trained.values())
    if not alignment.requires_grad:
        return []
    reached = torch.autograd.grad(alignment, list(trained.values()), retain_graph=True, allow_unused=True)
    return [p for p, gradient in zip(trained.values(), reached, strict=True) if gradient is not None]
