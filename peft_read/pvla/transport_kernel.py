"""The entropic solver of partial transport as one Triton kernel: a program for each sample, its matrix in registers.

It runs the iterations of `transport._solve_entropic`, which explains them. Only level and factor, by which the total
mass is met, are found otherwise: by Newton's method, which takes a few sums where the other way takes a sort. The sum
that is to be met is concave in the factor, so that its tangents lie above it: from a factor that is too low no step
passes the root. And each step but the last fills another point, so that what is found at the end is exact.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .transport import ABSORB_EVERY, FORBIDDEN, FULL, LARGEST_RISE, SET_MASS_EVERY


TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _log_sum_exp(x, axis: tl.constexpr):
    most = tl.max(x, axis=axis, keep_dims=True)
    sums = tl.log(tl.sum(tl.exp(x - most), axis=axis, keep_dims=True)) + most
    return tl.reshape(sums, [x.shape[1 - axis]])


@triton.jit
def _level(log_sums, capacity, mask, s):
    """The level at which `sum_i min(capacity_i, exp(log_sums_i + level)) = s`."""
    filled_at = tl.log(capacity) - log_sums
    level = -float("inf")
    rises = 1
    while rises == 1:
        full = tl.sum(tl.where(mask & (filled_at <= level), capacity, 0.0), axis=0)
        free = tl.where(mask & (filled_at > level), log_sums, -float("inf"))
        most = tl.max(free, axis=0)
        rises = 0
        if most > -float("inf"):
            higher = tl.log(tl.maximum(s - full, TINY)) - most - tl.log(tl.sum(tl.exp(free - most), axis=0))
            if higher > level:
                level = higher
                rises = 1
    return level


@triton.jit
def _factor(sums, capacity, s, t):
    """The factor at which `sum_i min(capacity_i, sums_i factor) = s`, near `t`, the last one."""
    factor = 0.0
    rises = 1
    while rises == 1:
        is_filled = capacity <= sums * factor
        full = tl.sum(tl.where(is_filled, capacity, 0.0), axis=0)
        free = tl.sum(tl.where(is_filled, 0.0, sums), axis=0)
        rises = 0
        if free > 0.0:
            higher = (s - full) / free
            if higher > factor:
                factor = higher
                rises = 1
    return tl.minimum(tl.maximum(factor, t / 1e12), t * 1e12)


@triton.jit
def _unmet(sums, potential, capacity, top, mask, largest_rise):
    """How much an update of a side's potential would change the mass of its points."""
    updated = tl.minimum(capacity, sums * tl.exp(tl.minimum(top - potential, largest_rise)))
    return tl.sum(tl.where(mask, tl.abs(sums - updated), 0.0), axis=0)


@triton.jit(do_not_specialize=["frames", "n_iter"])
def _solve(
    costs, frame_capacities, word_capacities, totals, frame_masks, word_masks, plans, residuals,
    frames, words, n_iter, per_reg, forbidden, largest_rise, almost_all,
    absorb_every: tl.constexpr, set_mass_every: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, rows)
    j = tl.arange(0, columns)
    place = sample * frames * words + i[:, None] * words + j[None, :]
    inside = (i < frames)[:, None] & (j < words)[None, :]
    some_frames = tl.load(frame_masks + sample * frames + i, mask=i < frames, other=0) != 0
    some_words = tl.load(word_masks + sample * words + j, mask=j < words, other=0) != 0
    a = tl.load(frame_capacities + sample * frames + i, mask=some_frames, other=1.0)
    b = tl.load(word_capacities + sample * words + j, mask=some_words, other=1.0)
    s = tl.load(totals + sample)
    some_a = s < almost_all * tl.sum(tl.where(some_frames, a, 0.0), axis=0)
    some_b = s < almost_all * tl.sum(tl.where(some_words, b, 0.0), axis=0)
    top_f = tl.where(some_a, 0.0, float("inf"))
    top_g = tl.where(some_b, 0.0, float("inf"))

    logits = tl.load(costs + place, mask=inside, other=forbidden) * per_reg
    sums = _log_sum_exp(logits, 0)
    g = tl.minimum(tl.log(b) - sums - _level(sums, b, some_words, s), top_g)
    g = tl.where(some_words, g, 0.0)
    sums = _log_sum_exp(logits + g[None, :], 1)
    level = _level(sums, a, some_frames, s)
    f = tl.minimum(tl.log(a) - sums - level, top_f)
    f = tl.where(some_frames, f, 0.0)

    for start in tl.range(0, n_iter, absorb_every):
        logits = tl.load(costs + place, mask=inside, other=forbidden) * per_reg
        kernel = tl.exp(logits + (f + level)[:, None] + g[None, :])
        off = s / tl.sum(tl.sum(kernel, axis=1), axis=0)
        level += tl.log(off)
        kernel *= off
        most_u = tl.exp(tl.minimum(top_f - f, largest_rise))
        most_v = tl.exp(tl.minimum(top_g - g, largest_rise))
        u = tl.full([rows], 1.0, tl.float32)
        v = tl.full([columns], 1.0, tl.float32)
        t = 1.0
        for step in tl.range(1, 1 + tl.minimum(absorb_every, n_iter - start)):
            to_words = tl.sum(kernel * u[:, None], axis=0)
            if some_b & (step % (2 * set_mass_every) == set_mass_every):
                t = _factor(to_words * most_v, b, s, t)
            v = tl.minimum(b / (to_words * t), most_v)
            to_frames = tl.sum(kernel * v[None, :], axis=1)
            if some_a & (step % (2 * set_mass_every) == 0):
                t = _factor(to_frames * most_u, a, s, t)
            u = tl.minimum(a / (to_frames * t), most_u)
            t = s / tl.sum(to_frames * u, axis=0)
        f = tl.where(some_frames, tl.minimum(f + tl.log(tl.maximum(u, TINY)), top_f), 0.0)
        g = tl.where(some_words, tl.minimum(g + tl.log(tl.maximum(v, TINY)), top_g), 0.0)
        level += tl.log(t)

    logits = tl.load(costs + place, mask=inside, other=forbidden) * per_reg + f[:, None] + g[None, :]
    plan = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
    plan *= s / tl.sum(tl.sum(plan, axis=1), axis=0)
    tl.store(plans + place, plan, mask=inside)
    unmet = _unmet(tl.sum(plan, axis=1), f, a, top_f, some_frames, largest_rise)
    unmet += _unmet(tl.sum(plan, axis=0), g, b, top_g, some_words, largest_rise)
    tl.store(residuals + sample, unmet / s)


def solve(
    cost: Tensor, a: Tensor, b: Tensor, total: Tensor, masks: tuple[Tensor, Tensor], reg: float, n_iter: int
) -> tuple[Tensor, Tensor]:
    """Plan and residual, see `transport._solve_entropic`."""
    batch, frames, words = cost.shape
    rows, columns = (max(16, triton.next_power_of_2(points)) for points in (frames, words))
    tensors = [tensor.contiguous() for tensor in (cost, a, b, total, *masks)]
    plan, residual = torch.empty_like(tensors[0]), torch.empty_like(tensors[3])
    with torch.cuda.device(cost.device) if cost.is_cuda else nullcontext():
        _solve[(batch,)](
            *tensors, plan, residual, frames, words, n_iter, -1 / reg, FORBIDDEN * reg, LARGEST_RISE, FULL,
            ABSORB_EVERY, SET_MASS_EVERY, rows, columns,
            num_warps=min(16, max(1, rows * columns // 1024)), enable_fp_fusion=True,
        )  # fmt: skip
    return plan, residual
