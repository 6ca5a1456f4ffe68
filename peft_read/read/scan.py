"""The scan of one recurrence, in one direction, where every step is valid.

On CPU the vanilla and the gated recurrence run as one autograd function each, whose backward pass is written out: a
small step costs less than the bookkeeping that autograd and torch's CPU kernels wrap around it. Everything else goes
through torch's own kernels. Compiled models see the whole scan as one operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


GATES: dict[str, int] = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def scan(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """Run a recurrence over `x`.

    Args:
        kind: which recurrence, in torch's formulation of it: a key of `GATES`.
        x: `(batch, time, features)`.
        weights: input matrix `(gates * hidden, features)`, recurrent matrix `(gates * hidden, hidden)`, and the two
            biases `(gates * hidden,)` or none.
        start: the initial states, `(batch, hidden)` each: one, for an LSTM its memory as a second.

    Returns:
        The outputs `(batch, time, hidden)` and then the final states, like `start`.
    """
    if torch.compiler.is_compiling():
        none = x.new_empty(0)
        biases = weights[2:] or [none, none]
        memory = start[1] if kind == "lstm" else none
        outputs, *final = _scan_operator(kind, x, *weights[:2], *biases, start[0], memory)
        return [outputs, *final[: len(start)]]
    if x.shape[1] == 1:
        return _step(kind, x[:, 0], weights, start)
    if x.device.type == "cpu" and kind in ("rnn_tanh", "gru"):
        return _scan_on_cpu(kind, x, weights, start)
    return _scan_by_torch(kind, x, weights, start)


def _step(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """One step alone, as in decoding."""
    cell = getattr(torch, f"{kind}_cell")
    state = cell(x, start if kind == "lstm" else start[0], *weights)
    states = list(state) if kind == "lstm" else [state]
    return [states[0][:, None], *states]


def _scan_on_cpu(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    w_in, w_hidden, *biases = weights
    inputs = F.linear(x, w_in, biases[0] if biases else None).transpose(0, 1)
    bias = biases[1] if biases else w_hidden.new_zeros(w_hidden.shape[0])
    function = _GatedScan if kind == "gru" else _VanillaScan
    states = function.apply(inputs, w_hidden, bias, start[0]).transpose(0, 1)
    return [states, states[:, -1]]


def _scan_by_torch(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    # `train=True` keeps what the backward pass needs: cuDNN refuses it for a cell in eval mode otherwise.
    rest = (weights, len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, True)
    initial = [part[None].contiguous() for part in start]
    kernel = getattr(torch, kind)
    outputs, *final = kernel(x, initial if kind == "lstm" else initial[0], *rest)
    return [outputs, *(part[0] for part in final)]


# The operator takes and gives single tensors, empty where a recurrence has no such one: autograd sees no lists.


@torch.library.custom_op("peft_read::scan", mutates_args=())
def _scan_operator(
    kind: str,
    x: Tensor,
    w_in: Tensor,
    w_hidden: Tensor,
    b_in: Tensor,
    b_hidden: Tensor,
    hidden: Tensor,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, start = _as_lists(kind, w_in, w_hidden, b_in, b_hidden, hidden, memory)
    outputs, *final = scan(kind, x, weights, start)
    hidden, memory = (state.clone(memory_format=torch.contiguous_format) for state in [*final, memory][:2])
    return outputs.contiguous(), hidden, memory


@_scan_operator.register_fake
def _(
    kind: str,
    x: Tensor,
    w_in: Tensor,
    w_hidden: Tensor,
    b_in: Tensor,
    b_hidden: Tensor,
    hidden: Tensor,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], hidden.shape[-1]), hidden.new_empty(hidden.shape), memory.new_empty(memory.shape)


@torch.library.custom_op("peft_read::scan_backward", mutates_args=())
def _scan_backward_operator(kind: str, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    # Runs the scan again: a compiled model then keeps its inputs alone.
    with _autograd_inside_an_operator(), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        results = scan(kind, leaves[0], *_as_lists(kind, *leaves[1:]))
        found = torch.autograd.grad(results, leaves, grads[: len(results)], allow_unused=True)
    # Laid out as the fake below says, whatever the kernels' own layout.
    return [
        leaf.new_zeros(leaf.shape) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for leaf, grad in zip(leaves, found, strict=True)
    ]


@_scan_backward_operator.register_fake
def _(kind: str, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


@contextmanager
def _autograd_inside_an_operator() -> Iterator[None]:
    """Let operations be recorded, which torch switches off below an operator's own derivative."""
    keys = [getattr(torch._C.DispatchKey, name) for name in ("AutogradCPU", "AutogradCUDA", "AutogradFunctionality")]
    excluded = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in excluded:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _as_lists(kind: str, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and the initial states, without those that are empty."""
    weights = [weight for weight in tensors[:4] if weight.numel()]
    return weights, list(tensors[4:] if kind == "lstm" else tensors[4:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.kind = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return None, *_scan_backward_operator(ctx.kind, list(ctx.saved_tensors), [grad.contiguous() for grad in grads])


_scan_operator.register_autograd(_backward, setup_context=_setup_context)


class _VanillaScan(torch.autograd.Function):
    """h_t = tanh(inputs_t + W h_(t-1) + b), time first: `inputs (time, batch, hidden)` -> states of the same shape."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        driven = inputs + bias
        states = torch.empty_like(driven)
        recurrent = weight.t()
        hidden = start
        for drive, state in zip(driven.unbind(), states.unbind(), strict=True):
            torch.addmm(drive, hidden, recurrent, out=state)
            hidden = state.tanh_()
        ctx.save_for_backward(weight, start, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, start, states = ctx.saved_tensors
        slopes = 1 - states * states
        deltas = torch.empty_like(states)
        carry = torch.zeros_like(start)
        for g, slope, delta in zip(
            reversed(grad.unbind()), reversed(slopes.unbind()), reversed(deltas.unbind()), strict=True
        ):
            torch.add(g, carry, out=delta)
            delta.mul_(slope)
            carry = delta @ weight
        before = torch.cat([start[None], states[:-1]])
        grad_weight = deltas.flatten(0, 1).t() @ before.flatten(0, 1)
        return deltas, grad_weight, deltas.sum((0, 1)), carry


class _GatedScan(torch.autograd.Function):
    """The GRU of `nn.GRU`, time first: `inputs (time, batch, 3 * hidden)`, gates reset, update, new, to its states.

    r, z = sigmoid(inputs_rz + W_rz h + b_rz);  n = tanh(inputs_n + r * (W_n h + b_n));  h = n + z * (h - n).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        time, batch, width = inputs.shape
        size = width // 3
        states = inputs.new_empty(time, batch, size)
        recurrent = inputs.new_empty(time, batch, width)
        gates = inputs.new_empty(time, batch, 2 * size)
        news = inputs.new_empty(time, batch, size)
        inputs_gates, inputs_new = inputs[..., : 2 * size].unbind(), inputs[..., 2 * size :].unbind()
        into, out_of = recurrent[..., : 2 * size].unbind(), recurrent[..., 2 * size :].unbind()
        resets, updates = gates[..., :size].unbind(), gates[..., size:].unbind()
        transposed, hidden = weight.t(), start
        for t, (product, gate, new, state) in enumerate(
            zip(recurrent.unbind(), gates.unbind(), news.unbind(), states.unbind(), strict=True)
        ):
            torch.addmm(bias, hidden, transposed, out=product)
            torch.add(inputs_gates[t], into[t], out=gate)
            gate.sigmoid_()
            torch.addcmul(inputs_new[t], resets[t], out_of[t], out=new)
            new.tanh_()
            torch.lerp(new, hidden, updates[t], out=state)
            hidden = state
        ctx.save_for_backward(weight, start, states, recurrent[..., 2 * size :], gates, news)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, start, states, recurrent_new, gates, news = ctx.saved_tensors
        time, batch, size = states.shape
        reset, update = gates.chunk(2, dim=-1)
        before = torch.cat([start[None], states[:-1]])
        # What one unit of dh at a step sends into each gate before its nonlinearity; no step depends on another here.
        to_new = (1 - update) * (1 - news * news)
        to_reset = to_new * recurrent_new * reset * (1 - reset)
        to_update = (before - news) * update * (1 - update)
        share = torch.stack([to_reset, to_update, to_new * reset], dim=2)
        deltas = torch.empty_like(share)
        hidden_grads = torch.empty_like(states)
        flat = deltas.view(time, batch, 3 * size)
        carry = torch.zeros_like(start)
        for g, dh, part, delta, rows, keep in zip(
            *(reversed(t.unbind()) for t in (grad, hidden_grads, share, deltas, flat, update)), strict=True
        ):
            torch.add(g, carry, out=dh)
            torch.mul(dh[:, None], part, out=delta)
            carry = torch.addmm(dh * keep, rows, weight)
        grad_inputs = flat.clone()
        torch.mul(hidden_grads, to_new, out=grad_inputs[..., 2 * size :])
        grad_weight = flat.flatten(0, 1).t() @ before.flatten(0, 1)
        return grad_inputs, grad_weight, flat.sum((0, 1)), carry
