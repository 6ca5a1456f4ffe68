"""The scan of one recurrence, in one direction, where every step is valid; compiled models see it as one operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_tracing
from .dispatch import scan_eagerly, zero_states


def scan(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor] | None) -> list[Tensor]:
    """Run a recurrence over `x`.

    Args:
        kind: which recurrence, in torch's formulation of it: a key of `GATES`.
        x: `(batch, time, features)`.
        weights: input matrix `(gates * hidden, features)`, recurrent matrix `(gates * hidden, hidden)`, and the two
            biases `(gates * hidden,)` or none.
        start: the initial states, `(1, batch, hidden)` each: one, for an LSTM its memory as a second; None for zeros.

    Returns:
        The outputs `(batch, time, hidden)` and then the final states, like `start`.
    """
    if not is_tracing():
        return scan_eagerly(kind, x, weights, start)
    if start is None:
        start = zero_states(kind, x, weights)
    none = x.new_empty(0)
    biases = weights[2:] or [none, none]
    memory = start[1] if kind == "lstm" else none
    outputs, *final = _scan_operator(kind, x, *weights[:2], *biases, start[0], memory)
    return [outputs, *final[: len(start)]]


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
    outputs, *final = scan_eagerly(kind, x, weights, start)
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
    with autograd_inside_an_operator(), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        results = scan_eagerly(kind, leaves[0], *_as_lists(kind, *leaves[1:]))
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
def autograd_inside_an_operator() -> Iterator[None]:
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
