"""Partial optimal transport between the frames of videos and the words of sentences, for a whole batch at once."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import passes_trial, triton_runs
from ..precision import without_autocast


Marginals = Literal["unit", "uniform"] | tuple[Tensor, Tensor]

# Cost of a pair that may carry nothing, in units of reg. Finite, so that a sample without any pair gives no NaN.
FORBIDDEN = 1e25
# Iterations between two evaluations of exp(logits + potentials): products of many small steps drift off and overflow.
ABSORB_EVERY = 25
# Every 6th iteration updates the total mass together with one side's potentials, the sides alternating.
SET_MASS_EVERY = 6
# Bound of what a potential may rise between two absorptions: keeps products of two of its exponentials in float32.
LARGEST_RISE = 40.0
# A mass this close to all that a side can carry is all of it, in float32.
FULL = 1 - 1e-6
LARGEST_KERNEL = 2**15  # pairs of frames and words, whose matrix fits into a program's registers


class PartialTransport(NamedTuple):
    """What `partial_transport` returns.

    Attributes:
        plan: `(batch, frames, words)`, the mass that goes from each frame to each word; no gradient.
        cost: `(batch,)`, sum of cost times plan.
        residual: `(batch,)`, what another sweep of the solver would still move, as a share of the transported mass: 0
            at the optimum. It doesn't vanish while the plan merely stalls.
    """

    plan: Tensor
    cost: Tensor
    residual: Tensor


def partial_transport(
    cost: Tensor,
    mass: float | Tensor = 0.5,
    reg: float = 0.05,
    *,
    frame_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    marginals: Marginals = "unit",
    n_iter: int = 50,
    solver: Literal["entropic", "exact"] = "entropic",
) -> PartialTransport:
    """Move a share of the mass from frames to words at the least cost.

    Minimises `sum T C + reg * sum T (log T - 1)` over plans `T >= 0` whose rows sum to at most `a`, whose columns sum
    to at most `b`, and which carry `mass * min(sum a, sum b)` in total: Benamou et al. 2015 (arXiv 1412.5154),
    Proposition 5, the partial transport of READ's PVLA loss (arXiv 2312.06950). Solved in its dual, by block updates
    of one potential per frame and one per word; memory doesn't depend on `n_iter`.

    On CUDA, a Triton kernel runs the entropic solver where triton is installed, in float32, on a GPU of compute
    capability 8.0 or more, for up to 32768 pairs of frames and words, the numbers of both rounded up to powers of two.
    There a small problem is compared with torch's result first: if it fails, a warning says so, and torch runs. The
    environment variable `PEFT_READ_SCAN` forces either, `triton` or `torch`, here and in `recurrent_scan`.

    The gradient of the returned cost is the plan, by the envelope theorem: that of the minimised, regularised value,
    not of `sum T C` with a plan that moves along. It can't be differentiated a second time.

    Args:
        cost: `(batch, frames, words)`. Float64 is solved in float64, everything else in float32.
        mass: in (0, 1], the share that is transported; one for all, or `(batch,)`.
        reg: weight of the entropy, in the unit of the costs. Where it is below a hundredth of them, 50 iterations may
            not do: look at the residual.
        frame_mask: `(batch, frames)`, true where a frame is valid; all are by default.
        word_mask: `(batch, words)`, likewise. What lies in padding is ignored, NaN included; a sample without a valid
            frame or word has plan and cost 0.
        marginals: `"unit"`: a valid point carries at most `1 / min(frames, words)`, so that `mass` is the share of the
            shorter side that is matched one to one, and the longer side is free to choose; `"uniform"`: frames at most
            `1 / frames`, words `1 / words`; or both as tensors, `(batch, frames)` and `(batch, words)`.
        n_iter: iterations of the entropic solver.
        solver: `"entropic"`, or `"exact"`: without the entropy, by POT's linear program on the CPU, sample by sample.

    Returns:
        A [`PartialTransport`].

    Raises:
        ValueError: if a shape doesn't fit the cost's, or a number is out of its range; if the environment variable
            forces what can't be. Values in tensors on an accelerator aren't looked at, as that would stall it.

    Example:
        >>> costs = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])  # one video of three frames, two words
        >>> plan, cost, residual = partial_transport(costs, mass=0.5)
        >>> plan.round(decimals=3)  # half of the words' mass; the third frame is left out
        tensor([[[0.2500, 0.0000],
                 [0.0000, 0.2500],
                 [0.0000, 0.0000]]])
    """
    _check(cost, mass, reg, n_iter, frame_mask, word_mask)
    with without_autocast(cost.device):
        cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
        frames, words, masks = capacities(cost, marginals, frame_mask, word_mask)
        with torch.no_grad():
            # NaN in padding would survive a product with a plan of 0.
            costs = torch.where(masks[0][:, :, None] & masks[1][:, None, :], cost, FORBIDDEN * reg)
            total = torch.minimum(frames.sum(1), words.sum(1)) * (mass.to(cost) if isinstance(mass, Tensor) else mass)
            if solver == "entropic":
                solve = _solve_by_kernel if _runs_by_kernel(costs) else _solve_entropic
                plan, residual = solve(costs, frames, words, total, masks, reg, n_iter)
            elif solver == "exact":
                plan, residual = _solve_exact(costs, frames, words, total), torch.zeros_like(total)
            else:
                raise ValueError(f"solver={solver!r}: expected 'entropic' or 'exact'.")
            unsolvable = ~(masks[0].any(1) & masks[1].any(1))
            plan, residual = plan.masked_fill_(unsolvable[:, None, None], 0), residual.masked_fill_(unsolvable, 0)
            value = (plan * costs).sum((1, 2))
        return PartialTransport(plan, _Envelope.apply(cost, value, plan), residual)


def _runs_by_kernel(cost: Tensor) -> bool:
    """Whether the Triton kernel is to be used, see `triton_runs`."""
    lacks = None
    pairs = math.prod(2 ** max(4, (points - 1).bit_length()) for points in cost.shape[1:])
    if cost.dtype != torch.float32:
        lacks = f"costs in float32, and these are in {cost.dtype}"
    elif pairs > LARGEST_KERNEL:
        lacks = f"at most {LARGEST_KERNEL} pairs of frames and words, and here are {pairs} (of powers of two)"
    return triton_runs(cost, lacks, lambda: _passes_trial(cost.device))


@cache
def _passes_trial(device: torch.device) -> bool:
    """Whether the kernel gives on a GPU what torch does, see `passes_trial`."""

    def compare() -> list[tuple[Tensor, Tensor]]:
        plans = []
        for solve, dtype in ((_solve_by_kernel, torch.float32), (_solve_entropic, torch.float64)):
            cost = torch.linspace(0, 1, 2 * 40 * 20, dtype=dtype, device=device).mul(90).sin().view(2, 40, 20)
            frames, words, masks = capacities(cost, "unit", None, None)
            plans.append(solve(cost, frames, words, words.sum(1) / 2, masks, 0.1, 60)[0])
        return [(plans[0], plans[1])]

    return passes_trial(device, compare)


def _solve_by_kernel(cost: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from .transport_kernel import solve  # triton isn't everywhere

    return solve(cost, *args)


class _Envelope(torch.autograd.Function):
    """The minimised value as a function of the costs, whose gradient is the plan."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, value: Tensor, plan: Tensor) -> Tensor:
        ctx.save_for_backward(plan)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (plan,) = ctx.saved_tensors
        return gradient[:, None, None] * plan, None, None


def _solve_entropic(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    total: Tensor,
    masks: tuple[Tensor, Tensor],
    reg: float,
    n_iter: int,
) -> tuple[Tensor, Tensor]:
    """Plan and residual. The plan is `exp(logits + f + g + level)`: f and g the sides' potentials, `level` the mass's.

    A side of which all mass goes has an equality to meet, and its potential is free; else it is at most 0. Iterations
    run on `kernel = exp(...)` and factors u, v, t of the potentials' exponentials, by matrix-vector products.
    """
    # Vectors over frames and words are rows, `(batch, 1, points)`: products with rows are faster than with columns.
    # Padding gets any capacity above 0 and, its row of the kernel being 0, stays out of every sum.
    some_frames, some_words = (mask[:, None] for mask in masks)
    a, b, s = a[:, None].masked_fill(~some_frames, 1), b[:, None].masked_fill(~some_words, 1), total[:, None, None]
    some_a, some_b = _some_stays(a, some_frames, s), _some_stays(b, some_words, s)
    top_f, top_g = (torch.zeros_like(s).masked_fill(~some_stays, torch.inf) for some_stays in (some_a, some_b))

    # A start from the exact optimum over g and the level, then over f and the level, skips the slow
    # phase in which Dykstra's iterations barely move.
    kernel = cost / -reg  # written again and again: fresh memory for each would cost more than the arithmetic
    sums = _log_sum_exp_(kernel, 1)
    g = torch.minimum(b.log() - sums - _level(sums, b, some_words, s), top_g).masked_fill(~some_words, 0)
    sums = _log_sum_exp_(torch.add(g, cost, alpha=-1 / reg, out=kernel), 2).mT
    level = _level(sums, a, some_frames, s)
    f = torch.minimum(a.log() - sums - level, top_f).masked_fill(~some_frames, 0)

    transposed = torch.empty_like(kernel.mT, memory_format=torch.contiguous_format)
    for start in range(0, n_iter, ABSORB_EVERY):
        torch.add((f + level).mT, cost, alpha=-1 / reg, out=kernel).add_(g).exp_()
        off = s / kernel.sum((1, 2), keepdim=True)  # rounding would add up in the level
        level = level + off.log()
        transposed.copy_(kernel.mul_(off).mT)
        most_u, most_v = ((top - x).clamp(max=LARGEST_RISE).exp() for top, x in ((top_f, f), (top_g, g)))
        u, t = torch.ones_like(f), torch.ones_like(level)
        for i in range(1, 1 + min(ABSORB_EVERY, n_iter - start)):
            sums = torch.bmm(u, kernel)
            if i % (2 * SET_MASS_EVERY) == SET_MASS_EVERY:
                t = torch.where(some_b, _factor(sums * most_v, b, s, t), t)
            v = torch.minimum(b / sums.mul_(t), most_v)
            sums = torch.bmm(v, transposed)
            if i % (2 * SET_MASS_EVERY) == 0:
                t = torch.where(some_a, _factor(sums * most_u, a, s, t), t)
            u = torch.minimum(a / (sums * t), most_u)
            t = s / (sums * u).sum(2, keepdim=True)
        tiny = torch.finfo(u.dtype).tiny
        f = torch.minimum(f + u.clamp(min=tiny).log(), top_f).masked_fill(~some_frames, 0)
        g = torch.minimum(g + v.clamp(min=tiny).log(), top_g).masked_fill(~some_words, 0)
        level = level + t.log()

    # The mass from the potentials themselves, which bounds the plan whatever happened on the way.
    plan = torch.add(f.mT, cost, alpha=-1 / reg, out=kernel).add_(g)
    plan.sub_(plan.amax((1, 2), keepdim=True)).exp_()
    plan.mul_(s / plan.sum((1, 2), keepdim=True))
    residual = _unmet(plan.sum(2)[:, None], f, a, top_f, some_frames)
    residual = residual + _unmet(plan.sum(1, keepdim=True), g, b, top_g, some_words)
    return plan, residual / total


def _log_sum_exp_(x: Tensor, dim: int) -> Tensor:
    """Its logsumexp, dimension kept. `x` is overwritten."""
    most = x.amax(dim, keepdim=True)
    return x.sub_(most).exp_().sum(dim, keepdim=True).log_().add_(most)


def _some_stays(capacity: Tensor, mask: Tensor, s: Tensor) -> Tensor:
    """`(batch, 1, 1)`: whether a side keeps some of its mass."""
    return s < FULL * (capacity * mask).sum(2, keepdim=True)


def _level(log_sums: Tensor, capacity: Tensor, mask: Tensor, s: Tensor) -> Tensor:
    """The `level` at which `sum_i min(capacity_i, exp(log_sums_i + level)) = s`, exactly: `(batch, 1, 1)`.

    The sum is the least, over k, of what it is if the k points that fill up first are full, so the level is the
    largest of those k's levels.
    """
    order = (capacity.log() - log_sums).masked_fill(~mask, torch.inf).argsort(2)
    capacity = (capacity * mask).gather(2, order)
    full = capacity.cumsum(2) - capacity
    free = log_sums.masked_fill(~mask, -FORBIDDEN).gather(2, order).flip(2).logcumsumexp(2).flip(2)
    levels = (s - full).clamp(min=torch.finfo(s.dtype).tiny).log() - free
    return levels.masked_fill(free < -FORBIDDEN / 2, -torch.inf).amax(2, keepdim=True)


def _factor(sums: Tensor, capacity: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The factor at which `sum_i min(capacity_i, sums_i factor) = s`: that of `_level`, for moderate `sums` >= 0.

    Exactly: a step that passes the root lowers the dual value, and may do so time and again.
    """
    filled_at, order = (capacity / sums).sort(2)
    capacity = capacity.gather(2, order)
    full = capacity.cumsum(2).sub_(capacity)
    free = (capacity / filled_at).flip(2).cumsum(2).flip(2)
    factor = ((s - full) / free).masked_fill_(free <= 0, 0).amax(2, keepdim=True)
    bound = 1e12  # against t, the last one: far from the solution, all that is free may have underflown
    return factor.clamp(t / bound, t * bound)


def _unmet(sums: Tensor, potential: Tensor, capacity: Tensor, top: Tensor, mask: Tensor) -> Tensor:
    """How much an update of a side's potential would change the mass of its points, `(batch,)`."""
    updated = torch.minimum(capacity, sums * (top - potential).clamp(max=LARGEST_RISE).exp())
    return ((sums - updated).abs() * mask).sum((1, 2))


def _solve_exact(cost: Tensor, a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """The plan of POT's linear program, sample by sample."""
    from ot.partial import partial_wasserstein  # POT takes seconds to import

    plans = np.zeros(cost.shape)
    host = [x.double().cpu().numpy() for x in (cost, a, b, total)]
    for plan, costs, rows, columns, s in zip(plans, *host, strict=True):
        points = np.ix_(rows > 0, columns > 0)
        rows, columns, costs = rows[rows > 0], columns[columns > 0], costs[points]
        if not s > 0:
            continue
        if not np.isfinite(costs).all():
            plan[:] = np.nan
            continue
        # POT takes a multiple of the largest cost for infinity, which fails where costs are 0 or negative. Adding the
        # same to all leaves the plan as it is.
        costs = (costs - costs.min()) / (np.ptp(costs) or 1) + 1
        plan[points] = partial_wasserstein(rows, columns, costs, m=min(s, rows.sum(), columns.sum()))
    return torch.from_numpy(plans).to(cost)


def capacities(
    cost: Tensor, marginals: Marginals, frame_mask: Tensor | None, word_mask: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What each frame and each word can carry, 0 in padding, and which can carry anything.

    Args:
        cost: `(batch, frames, words)`, of which only shape, dtype and device count.
        marginals: as of [`partial_transport`].
        frame_mask: likewise.
        word_mask: likewise.

    Returns:
        `(batch, frames)` and `(batch, words)` in the dtype of the costs, and a mask for each.

    Raises:
        ValueError: if tensors as `marginals` don't fit or have negative entries.
    """
    batch, frames, words = cost.shape
    sides = []
    for mask, points in ((frame_mask, frames), (word_mask, words)):
        sides.append(cost.new_ones(batch, points, dtype=torch.bool) if mask is None else mask.bool())
    counts = [mask.sum(1, keepdim=True).clamp(min=1).to(cost) for mask in sides]
    if marginals == "unit":
        counts = [torch.minimum(*counts)] * 2
    elif not isinstance(marginals, str):
        for name, given, mask in zip(("frames", "words"), marginals, sides, strict=True):
            if given.shape != mask.shape:
                raise ValueError(f"marginals of the {name} have shape {tuple(given.shape)}, not {tuple(mask.shape)}.")
            if given.device.type == "cpu" and (given < 0).any():
                raise ValueError(f"marginals of the {name} have negative entries; expected what each may carry.")
        a, b = (given.detach().to(cost).masked_fill(~mask, 0) for given, mask in zip(marginals, sides, strict=True))
        return a, b, (a > 0, b > 0)
    elif marginals != "uniform":
        raise ValueError(f"marginals={marginals!r}: expected 'unit', 'uniform' or a pair of tensors.")
    a, b = (mask / count for mask, count in zip(sides, counts, strict=True))
    return a, b, (sides[0], sides[1])


def _check(
    cost: Tensor,
    mass: float | Tensor,
    reg: float,
    n_iter: int,
    frame_mask: Tensor | None,
    word_mask: Tensor | None,
) -> None:
    if cost.ndim != 3 or not cost.is_floating_point():
        raise ValueError(
            f"cost has shape {tuple(cost.shape)} and dtype {cost.dtype}; expected (batch, frames, words), floats."
        )
    for name, mask, shape in (("frame_mask", frame_mask, cost.shape[:2]), ("word_mask", word_mask, cost.shape[::2])):
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; the cost has {tuple(shape)} of these.")
    if isinstance(mass, Tensor) and mass.shape not in {(), cost.shape[:1]}:
        raise ValueError(
            f"mass has shape {tuple(mass.shape)}; expected a number, or one for each of {len(cost)} samples."
        )
    if not isinstance(mass, Tensor):
        in_range = 0 < mass <= 1
    else:
        in_range = mass.device.type != "cpu" or bool(((mass > 0) & (mass <= 1)).all())
    if not in_range:
        raise ValueError(f"mass={mass}: expected a share of the mass in (0, 1].")
    if not reg > 0:
        raise ValueError(f"reg={reg}: expected a positive number; for the unregularised problem use solver='exact'.")
    if n_iter < 1:
        raise ValueError(f"n_iter={n_iter}: expected at least 1.")
