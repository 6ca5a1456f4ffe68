"""The vanilla and the gated recurrence in torch's operations, parallel in time, with backward passes written out.

Sequences that are too short to be cut run through torch's own kernel, without autograd; their backward pass recomputes
what it needs from the saved states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import backward_without_autocast
from .chunks import Chunks, Steps


class VanillaScan(torch.autograd.Function):
    """h_t = tanh(W_in x_t + b_in + W h_(t-1) + b): `(batch, time, features)` -> states `(batch, time, hidden)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_hidden: Tensor, b_in: Tensor, b_hidden: Tensor, start: Tensor
    ) -> Tensor:
        """The scan, and what its backward pass needs of it."""
        chunks = ctx.chunks = Chunks(x, start.shape[2])
        if chunks.count == 1:
            outputs = _by_torch(torch.rnn_tanh, x, start, w_in, w_hidden, b_in, b_hidden)
            ctx.save_for_backward(x, outputs, start, w_in, w_hidden)
            return outputs
        drives = chunks.cut(F.linear(x, w_in, b_in + b_hidden))
        ends = drives.new_empty(chunks.length + 1, *drives.shape[1:])  # where each step begins, and the last one ends
        states, transposed = ends[1:], w_hidden.t()

        def run(hidden: Tensor, steps: Steps) -> Tensor:
            for drive, state in steps:
                hidden = torch.addmm(drive, hidden, transposed, out=state).tanh_()
            return hidden

        ends[0], _ = chunks.settle(run, (drives, states), start[0])
        ctx.save_for_backward(x, ends, start, w_in, w_hidden)
        return chunks.join(states)

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of what `forward` was given, in its order."""
        x, ends, start, w_in, w_hidden = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        if chunks.count == 1:
            ends = torch.cat([start, ends.transpose(0, 1)])
        grads, states = chunks.cut_gradient(grad), ends[1:]
        slopes = torch.addcmul(states.new_ones(()), states, states, value=-1)
        deltas = torch.empty_like(grads)

        def run(carry: Tensor, steps: Steps) -> Tensor:
            later = None
            for g, slope, delta in steps:
                if later is None:
                    torch.add(g, carry, out=delta)
                else:
                    torch.addmm(g, later, w_hidden, out=delta)
                later = delta.mul_(slope)
            return later @ w_hidden

        _, carries = chunks.settle(run, (grads, slopes, deltas), torch.zeros_like(start[0]), backwards=True)
        grad_w_hidden = deltas.flatten(0, 1).t() @ ends[:-1].flatten(0, 1)
        grad_inputs = chunks.join(deltas, out=grads)
        rows = grad_inputs.flatten(0, 1)
        grad_bias = rows.sum(0)
        return (
            grad_inputs @ w_in,
            rows.t() @ x.flatten(0, 1),
            grad_w_hidden,
            grad_bias,
            grad_bias,
            carries[None, : chunks.batch],
        )


class GatedScan(torch.autograd.Function):
    """The GRU of `nn.GRU`, gates reset, update, new: `(batch, time, features)` -> states `(batch, time, hidden)`.

    r, z = sigmoid(W_in x + b_in + W h + b);  n = tanh(W_in x + b_in + r * (W h + b));  h = n + z * (h - n).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_hidden: Tensor, b_in: Tensor, b_hidden: Tensor, start: Tensor
    ) -> Tensor:
        """The scan, and what its backward pass needs of it."""
        chunks = ctx.chunks = Chunks(x, start.shape[2])
        weights = (w_in, w_hidden, b_in, b_hidden)
        if chunks.count == 1:
            outputs = _by_torch(torch.gru, x, start, *weights)
            ctx.save_for_backward(*weights, x, outputs, start)
            return outputs
        size = start.shape[2]
        drives, drives_new = (chunks.cut(drive) for drive in _drives(x, *weights))
        to_gates, to_new = w_hidden.t().split([2 * size, size], dim=1)
        gates, inner, news = torch.empty_like(drives), torch.empty_like(drives_new), torch.empty_like(drives_new)
        ends = drives.new_empty(chunks.length + 1, *drives_new.shape[1:])
        resets, updates = gates.chunk(2, dim=-1)
        bias = b_hidden[2 * size :]

        def run(hidden: Tensor, steps: Steps) -> Tensor:
            for drive, drive_new, gate, reset, update, product, new, state in steps:
                torch.addmm(drive, hidden, to_gates, out=gate).sigmoid_()
                torch.addmm(bias, hidden, to_new, out=product)
                torch.addcmul(drive_new, reset, product, out=new).tanh_()
                hidden = torch.lerp(new, hidden, update, out=state)
            return hidden

        tensors = (drives, drives_new, gates, resets, updates, inner, news, ends[1:])
        ends[0], _ = chunks.settle(run, tensors, start[0])
        ctx.save_for_backward(*weights, x, ends, start, gates, inner, news)
        return chunks.join(ends[1:])

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of what `forward` was given, in its order."""
        w_in, w_hidden, b_in, b_hidden, x, ends, start, *found = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        size = start.shape[2]
        if chunks.count == 1:
            ends = torch.cat([start, ends.transpose(0, 1)])
            found = _gates(x.transpose(0, 1), ends[:-1], w_in, w_hidden, b_in, b_hidden)
        gates, inner, news = found
        before, (resets, updates) = ends[:-1], gates.chunk(2, dim=-1)
        # What one unit of dh at a step sends into each gate before its nonlinearity; no step depends on another here.
        shares = grad.new_empty(*before.shape[:2], 3, size)
        to_reset, to_update, to_inner = shares.unbind(2)
        to_new = torch.rsub(updates, 1)
        torch.sub(before, news, out=to_update).mul_(updates).mul_(to_new)
        to_new.addcmul_(to_new * news, news, value=-1)
        torch.mul(to_new, resets, out=to_inner)
        torch.mul(to_inner, inner, out=to_reset).addcmul_(to_reset, resets, value=-1)

        grads = chunks.cut_gradient(grad)
        hidden_grads, deltas = torch.empty_like(grads), torch.empty_like(shares)
        flat = deltas.flatten(2)

        def run(carry: Tensor, steps: Steps) -> Tensor:
            later: tuple[Tensor, ...] = ()
            for g, share, update, hidden_grad, spread, delta, row in steps:
                if later:
                    hidden_after, update_after, row_after = later
                    torch.addcmul(g, hidden_after, update_after, out=hidden_grad).addmm_(row_after, w_hidden)
                else:
                    torch.add(g, carry, out=hidden_grad)
                torch.mul(spread, share, out=delta)
                later = hidden_grad, update, row
            return torch.addmm(hidden_grad * update, row, w_hidden)

        tensors = (grads, shares, updates, hidden_grads, hidden_grads[:, :, None], deltas, flat)
        _, carries = chunks.settle(run, tensors, torch.zeros_like(start[0]), backwards=True)
        rows = flat.flatten(0, 1)
        grad_w_hidden, grad_b_hidden = rows.t() @ before.flatten(0, 1), rows.sum(0)
        torch.mul(hidden_grads, to_new, out=deltas[:, :, 2])  # the new gate's input isn't multiplied by the reset gate
        grad_inputs = chunks.join(flat, out=shares)
        rows = grad_inputs.flatten(0, 1)
        return (
            grad_inputs @ w_in,
            rows.t() @ x.flatten(0, 1),
            grad_w_hidden,
            rows.sum(0),
            grad_b_hidden,
            carries[None, : chunks.batch],
        )


def _by_torch(kernel: Callable[..., tuple[Tensor, Tensor]], x: Tensor, start: Tensor, *weights: Tensor) -> Tensor:
    """The states, by torch's loop; without gradients, for which it rounds otherwise than for trained weights."""
    weights = tuple(weight.detach() for weight in weights)
    biases, layers, dropout, training, directions, batch_first = True, 1, 0.0, False, False, True
    return kernel(x, start, weights, biases, layers, dropout, training, directions, batch_first)[0]


def _drives(x: Tensor, w_in: Tensor, w_hidden: Tensor, b_in: Tensor, b_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the input adds to the gates, with their recurrent biases, and to the new state."""
    size = w_hidden.shape[1]
    gates = F.linear(x, w_in[: 2 * size], b_in[: 2 * size] + b_hidden[: 2 * size])
    return gates, F.linear(x, w_in[2 * size :], b_in[2 * size :])


def _gates(
    x: Tensor, before: Tensor, w_in: Tensor, w_hidden: Tensor, b_in: Tensor, b_hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, the new state's recurrent part, and the new state, from the states `before` each step."""
    size = before.shape[-1]
    gates, news = _drives(x, w_in, w_hidden, b_in, b_hidden)
    gates += F.linear(before, w_hidden[: 2 * size])
    inner = F.linear(before, w_hidden[2 * size :], b_hidden[2 * size :])
    gates.sigmoid_()
    return gates, inner, news.addcmul_(gates[..., :size], inner).tanh_()
