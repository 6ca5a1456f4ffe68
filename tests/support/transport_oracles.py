"""Partial transport as it is defined: slow, one sample at a time, matrices where the package has vectors."""

import numpy as np
import ot
import torch
import torch.nn.functional as F
from scipy.optimize import linprog


SIZES = [(8, 8), (32, 16), (75, 32), (256, 64)]


def cosine_costs(size, dim=64, batch=4, seed=0, dtype=torch.float64):
    """Costs of random normal features, of `batch` samples."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(batch, n, dim, generator=generator, dtype=torch.float64), dim=-1) for n in size)
    return (1 - x @ y.mT).to(dtype)


def capacities(size, marginals):
    """What each frame and each word may carry, as float64."""
    counts = (min(size), min(size)) if marginals == "unit" else size
    return tuple(torch.full((n,), 1 / count, dtype=torch.float64) for n, count in zip(size, counts, strict=True))


def pot_entropic(cost, a, b, s, reg, n_iter=4000):
    """POT's solver of the same problem, which has to run to the end: it stops too early at any other `stopThr`."""
    s = torch.as_tensor(s, dtype=cost.dtype).clamp(max=min(a.sum(), b.sum()))
    return ot.partial.entropic_partial_wasserstein(a, b, cost, reg, m=s, method="sinkhorn_log", numItermax=n_iter)


def linear_program(cost, a, b, s):
    """The least cost without entropy."""
    rows, columns = cost.shape
    limits = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    found = linprog(
        cost.ravel(), A_ub=limits, b_ub=np.concatenate([a, b]), A_eq=np.ones((1, cost.size)), b_eq=[s], method="highs"
    )
    assert found.success, found.message
    return found.fun


def regularised_value(plan, cost, reg):
    """What is minimised, of every sample: `(batch,)`."""
    return (plan * cost + reg * (torch.xlogy(plan, plan) - plan)).sum((-2, -1))


def central_differences(function, x, step=1e-5):
    """Gradient at the one sample x, `(1, ...)`, of a function of a batch of samples to `(batch,)`."""
    steps = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape[1:])
    return ((function(x + steps) - function(x - steps)) / (2 * step)).view_as(x)


def relative_error(plan, reference):
    """L1 distance of two plans over the mass, the worst of the samples."""
    return ((plan - reference).abs().sum((1, 2)) / reference.sum((1, 2))).max().item()


def assert_feasible(plan, a, b, total, atol=1e-4):
    assert (plan >= 0).all()
    torch.testing.assert_close(
        plan.sum((1, 2)), torch.as_tensor(total, dtype=plan.dtype).expand(len(plan)), rtol=atol, atol=0
    )
    assert (plan.sum(2) <= a * (1 + atol)).all()
    assert (plan.sum(1) <= b * (1 + atol)).all()
