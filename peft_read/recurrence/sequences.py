"""The scan over the valid steps of padded rows, and over rows in which several sequences lie one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tracing import is_tracing
from .compaction import Compaction
from .operator import autograd_inside_an_operator, scan


def masked_scan(
    kind: str, x: Tensor, mask: Tensor | None, weights: list[Tensor], start: list[Tensor] | None, needs_memory: bool
) -> list[Tensor]:
    """`scan` over the valid steps alone; an LSTM's last memory may be wrong under a mask if it isn't needed."""
    if mask is None:
        return scan(kind, x, weights, start)
    compaction = Compaction(mask)
    compact = compaction.front(x)
    if kind == "lstm" and needs_memory:
        # It isn't among the outputs, so the padding at the end must leave it as it is: one more feature, set there,
        # shuts the input gate and opens the forget gate, both exactly.
        compact = torch.cat([compact, compaction.padding.to(x.dtype)], dim=-1)
        weights = _with_stop_feature(weights)
    outputs, *final = scan(kind, compact, weights, start)
    first = outputs.new_zeros(outputs.shape[0], outputs.shape[2]) if start is None else start[0][0]
    outputs = compaction.back(outputs, first)
    return [outputs, outputs[None, :, -1], *final[1:]]


def scan_sequences(kind: str, x: Tensor, mask: Tensor | None, starts: Tensor, weights: list[Tensor]) -> Tensor:
    """`scan` over sequences that lie in the rows of a batch one after another, each from a state of zero.

    Args:
        kind: as in `scan`.
        x: `(batch, time, features)`.
        mask: `(batch, time)`, true where a step is valid; all are by default.
        starts: `(batch, time)`, true where a sequence begins, besides each row's first step.
        weights: as in `scan`.

    Returns:
        `(batch, time, hidden)`.
    """
    if not is_tracing():
        return _scan_sequences(kind, x, mask, starts, weights)
    none = x.new_empty(0)
    biases = weights[2:] or [none, none]
    valid = torch.ones_like(starts) if mask is None else mask
    return _sequences_operator(kind, x, *weights[:2], *biases, valid, starts)


def _scan_sequences(kind: str, x: Tensor, mask: Tensor | None, starts: Tensor, weights: list[Tensor]) -> Tensor:
    """Every sequence in a row of its own, padded to the longest one."""
    batch, time, _ = x.shape
    begins = starts.clone()
    begins[:, 0] = True
    edges = begins.flatten().nonzero()[:, 0]
    lengths = torch.cat([edges, edges.new_tensor([batch * time])]).diff()
    columns = torch.arange(int(lengths.max()), device=x.device)
    inside = columns < lengths[:, None]
    places = (edges[:, None] + columns).clamp(max=batch * time - 1)
    apart = x.flatten(0, 1)[places]
    valid = inside if mask is None else inside & mask.flatten()[places]
    outputs, *_ = masked_scan(kind, apart, valid, weights, None, needs_memory=False)
    return outputs[inside].view(batch, time, -1)


# How many sequences there are, and how long, depends on values: compiled models see one operator.


@torch.library.custom_op("peft_read::scan_sequences", mutates_args=())
def _sequences_operator(
    kind: str,
    x: Tensor,
    w_in: Tensor,
    w_hidden: Tensor,
    b_in: Tensor,
    b_hidden: Tensor,
    valid: Tensor,
    starts: Tensor,
) -> Tensor:
    weights = [weight for weight in (w_in, w_hidden, b_in, b_hidden) if weight.numel()]
    return _scan_sequences(kind, x, valid, starts, weights).contiguous()


@_sequences_operator.register_fake
def _(
    kind: str,
    x: Tensor,
    w_in: Tensor,
    w_hidden: Tensor,
    b_in: Tensor,
    b_hidden: Tensor,
    valid: Tensor,
    starts: Tensor,
) -> Tensor:
    return x.new_empty(*x.shape[:2], w_hidden.shape[1])


@torch.library.custom_op("peft_read::scan_sequences_backward", mutates_args=())
def _sequences_backward_operator(
    kind: str, inputs: list[Tensor], valid: Tensor, starts: Tensor, grad: Tensor
) -> list[Tensor]:
    with autograd_inside_an_operator(), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        weights = [weight for weight in leaves[1:] if weight.numel()]
        outputs = _scan_sequences(kind, leaves[0], valid, starts, weights)
        found = torch.autograd.grad(outputs, leaves, grad, allow_unused=True)
    return [
        leaf.new_zeros(leaf.shape) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for leaf, grad in zip(leaves, found, strict=True)
    ]


@_sequences_backward_operator.register_fake
def _(kind: str, inputs: list[Tensor], valid: Tensor, starts: Tensor, grad: Tensor) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.kind = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, valid, starts = ctx.saved_tensors
    return None, *_sequences_backward_operator(ctx.kind, inputs, valid, starts, grad.contiguous()), None, None


_sequences_operator.register_autograd(_backward, setup_context=_setup_context)


def _with_stop_feature(weights: list[Tensor]) -> list[Tensor]:
    """LSTM weights (gates: in, forget, new, out) with one more feature, which freezes the memory where it is 1."""
    w_in = weights[0]
    size = w_in.shape[0] // 4
    stop = torch.cat([w_in.new_full((size, 1), -1e4), w_in.new_full((size, 1), 1e4), w_in.new_zeros(2 * size, 1)])
    return [torch.cat([w_in, stop], dim=1), *weights[1:]]
