"""The vanilla and the gated recurrence on CPU, parallel in time, with their backward passes written out.

A recurrence that is as narrow as an adapter's forgets quickly. So the sequence is cut into chunks, and all of them run
at once, from guessed initial states; each hands its last state to its successor, and they run again, until nothing
changes. The result is that of the sequential scan, after a few rounds that are each as long as one chunk. Where it
takes more, for a recurrence that doesn't forget, the sequential scan runs after all. The backward pass, a linear
recurrence in reverse time, goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


CHUNK = 32
MOST_ROUNDS = 4
# A loop takes an initial state `(rows, width)` and what drives each step, tensors `(time, rows, ...)`; it gives the
# last state and tensors of the same layout.
Loop: TypeAlias = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


class VanillaScan(torch.autograd.Function):
    """h_t = tanh(inputs_t + W h_(t-1) + b), time first: `inputs (time, batch, hidden)` -> states of the same shape."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        transposed = weight.t()

        def loop(hidden: Tensor, driven: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            states = torch.empty_like(driven[0])
            for drive, state in zip(driven[0].unbind(), states.unbind(), strict=True):
                torch.addmm(drive, hidden, transposed, out=state)
                hidden = state.tanh_()
            return hidden, [states]

        (states,) = in_chunks(loop, start, [inputs + bias])
        ctx.save_for_backward(weight, start, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, start, states = ctx.saved_tensors

        def loop(carry: Tensor, steps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            deltas = torch.empty_like(steps[0])
            for g, slope, delta in zip(*(tensor.unbind() for tensor in (*steps, deltas)), strict=True):
                torch.add(g, carry, out=delta)
                delta.mul_(slope)
                carry = delta @ weight
            return carry, [deltas]

        slopes = 1 - states * states
        (reversed_deltas,) = in_chunks(loop, torch.zeros_like(start), [grad.flip(0), slopes.flip(0)])
        deltas = reversed_deltas.flip(0)
        before = torch.cat([start[None], states[:-1]])
        grad_weight = deltas.flatten(0, 1).t() @ before.flatten(0, 1)
        return deltas, grad_weight, deltas.sum((0, 1)), deltas[0] @ weight


class GatedScan(torch.autograd.Function):
    """The GRU of `nn.GRU`, time first: `inputs (time, batch, 3 * hidden)`, gates reset, update, new, to its states.

    r, z = sigmoid(inputs_rz + W_rz h + b_rz);  n = tanh(inputs_n + r * (W_n h + b_n));  h = n + z * (h - n).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        size = start.shape[-1]
        transposed = weight.t()

        def loop(hidden: Tensor, steps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            (driven,) = steps
            states, news = driven.new_empty(2, *driven.shape[:2], size).unbind()
            recurrent, gates = torch.empty_like(driven), driven.new_empty(*driven.shape[:2], 2 * size)
            for drive, drive_new, product, into, out_of, gate, reset, update, new, state in zip(
                driven[..., : 2 * size].unbind(),
                driven[..., 2 * size :].unbind(),
                recurrent.unbind(),
                recurrent[..., : 2 * size].unbind(),
                recurrent[..., 2 * size :].unbind(),
                gates.unbind(),
                gates[..., :size].unbind(),
                gates[..., size:].unbind(),
                news.unbind(),
                states.unbind(),
                strict=True,
            ):
                torch.addmm(bias, hidden, transposed, out=product)
                torch.add(drive, into, out=gate)
                gate.sigmoid_()
                torch.addcmul(drive_new, reset, out_of, out=new)
                new.tanh_()
                hidden = torch.lerp(new, hidden, update, out=state)
            return hidden, [states, recurrent[..., 2 * size :], gates, news]

        states, recurrent_new, gates, news = in_chunks(loop, start, [inputs])
        ctx.save_for_backward(weight, start, states, recurrent_new, gates, news)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, start, states, recurrent_new, gates, news = ctx.saved_tensors
        size = states.shape[-1]
        reset, update = gates.chunk(2, dim=-1)
        before = torch.cat([start[None], states[:-1]])
        # What one unit of dh at a step sends into each gate before its nonlinearity; no step depends on another here.
        to_new = (1 - update) * (1 - news * news)
        to_reset = to_new * recurrent_new * reset * (1 - reset)
        to_update = (before - news) * update * (1 - update)
        share = torch.stack([to_reset, to_update, to_new * reset], dim=2)

        def loop(carry: Tensor, steps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            g, share, keep = steps
            hidden_grads, deltas = torch.empty_like(g), torch.empty_like(share)
            rows = deltas.flatten(2)
            for step in zip(*(t.unbind() for t in (g, share, keep, hidden_grads, deltas, rows)), strict=True):
                now, part, kept, dh, delta, row = step
                torch.add(now, carry, out=dh)
                torch.mul(dh[:, None], part, out=delta)
                carry = torch.addmm(dh * kept, row, weight)
            return carry, [hidden_grads, deltas]

        backwards = [tensor.flip(0) for tensor in (grad, share, update)]
        hidden_grads, deltas = (t.flip(0) for t in in_chunks(loop, torch.zeros_like(start), backwards))
        flat = deltas.flatten(2)
        grad_inputs = flat.clone()
        torch.mul(hidden_grads, to_new, out=grad_inputs[..., 2 * size :])
        grad_weight = flat.flatten(0, 1).t() @ before.flatten(0, 1)
        grad_start = torch.addmm(hidden_grads[0] * update[0], flat[0], weight)
        return grad_inputs, grad_weight, flat.sum((0, 1)), grad_start


def in_chunks(loop: Loop, start: Tensor, steps: list[Tensor]) -> list[Tensor]:
    """What `loop` gives for all steps, chunks of them at once.

    Args:
        loop: one recurrence.
        start: its initial state, `(batch, width)`.
        steps: what drives it, `(time, batch, ...)` each.

    Returns:
        The loop's tensors, `(time, batch, ...)` each: to rounding, those that it gives in one go.
    """
    time, batch = steps[0].shape[:2]
    if time < 2 * CHUNK:
        return loop(start, steps)[1]
    count = -(-time // CHUNK)
    chunks = [_cut(tensor, count) for tensor in steps]
    starts = torch.cat([start[None], start.new_zeros(count - 1, *start.shape)])
    for _ in range(MOST_ROUNDS):
        ends, results = loop(starts.flatten(0, 1), chunks)
        handed = torch.cat([start[None], ends.unflatten(0, (count, batch))[:-1]])
        if _close(handed, starts):
            return [result.unflatten(1, (count, batch)).transpose(0, 1).flatten(0, 1)[:time] for result in results]
        starts = handed
    return loop(start, steps)[1]


def _cut(steps: Tensor, count: int) -> Tensor:
    """`(time, batch, ...)` to `(CHUNK, count * batch, ...)`, zeros where the last chunk isn't full."""
    missing = count * CHUNK - len(steps)
    if missing:
        steps = torch.cat([steps, steps.new_zeros(missing, *steps.shape[1:])])
    return steps.unflatten(0, (count, CHUNK)).transpose(0, 1).flatten(1, 2)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two guesses differ by no more than a few roundings of the largest state."""
    return bool((a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * a.abs().max())
