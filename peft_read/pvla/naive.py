"""Partial transport as it is defined, step by step: what `partial_transport` must equal. The first file to read."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_partial_transport(
    cost: Tensor, rows: Tensor, columns: Tensor, total: float | Tensor, reg: float, n_iter: int = 20_000
) -> Tensor:
    """The plan of one sample, by Dykstra's iterations on the whole plan.

    Minimises `sum T C + reg * sum T (log T - 1)` over plans `T >= 0` with

    - rows that sum to at most what each frame may carry, `T 1 <= rows`,
    - columns that sum to at most what each word may carry, `T' 1 <= columns`,
    - a total of `1' T 1 = total`.

    The minimiser is the projection of `exp(-C / reg)` onto the three sets, as the Kullback-Leibler divergence measures
    it (Benamou et al. 2015, arXiv 1412.5154, Proposition 5). Projecting onto one set after the other finds a plan in
    all three, but not the nearest one: the first two sets aren't affine. Dykstra's algorithm undoes, before each
    projection, what the same projection did one round ago. Slow: it may stall for hundreds of rounds.

    Args:
        cost: `(frames, words)`, in float64 for an exact result.
        rows: `(frames,)`, what each frame may carry.
        columns: `(words,)`, likewise.
        total: the mass that is moved, at most `min(rows.sum(), columns.sum())`.
        reg: weight of the entropy, in the unit of the costs.
        n_iter: rounds of three projections.

    Returns:
        `(frames, words)`, the mass that goes from each frame to each word.
    """
    plan = torch.exp(-cost / reg)
    undone = [torch.ones_like(plan) for _ in range(3)]
    for _ in range(n_iter):
        for i in range(3):
            before = plan * undone[i]
            if i == 0:
                plan = before * (rows / before.sum(1)).clamp(max=1)[:, None]
            elif i == 1:
                plan = before * (columns / before.sum(0)).clamp(max=1)
            else:
                plan = before * (total / before.sum())
            undone[i] = before / plan
    return plan
