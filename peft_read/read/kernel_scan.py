"""The recurrences by Triton's kernels, as an autograd function."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import backward_without_autocast
from .kernel import all_chunks, one_after_another


CHUNK = 32
ROUNDS = 2
VECTORS = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}  # that a step keeps for the backward pass, and it gives


def _settle(
    kind: str,
    start: Tensor,
    scales: Tensor,
    tensors: tuple[Tensor, ...],
    *,
    backward: bool = False,
    keep: bool = False,
) -> Tensor:
    """Run a recurrence over all chunks until each began with what its predecessor ended with.

    Args:
        kind: of `VECTORS`.
        start: `(batch, 2, size)`, the state to start from and an LSTM's memory.
        scales: `(batch,)`, a few roundings of which don't matter.
        tensors: what the kernels read and write, as said there.
        backward: run the linear recurrence of the gradients, from the last step to the first.
        keep: store what the backward pass needs.

    Returns:
        State and memory after the last step, like `start`.
    """
    batch, _, size = start.shape
    states = tensors[4]
    time = states.shape[1]
    count = triton.cdiv(time, CHUNK)
    padded = max(16, triton.next_power_of_2(size))
    begun, *ends = start.new_empty(ROUNDS + 2, batch, count, 2, size)
    numbers = (time, size, count, 4 * torch.finfo(torch.float32).eps)
    options: dict[str, Any] = {"kind": kind, "backward": backward, "keep": keep, "length": CHUNK, "padded": padded}
    # The recurrent matrices take some 32 registers of every thread, as long as there may be more threads.
    options["num_warps"] = min(32, max(1, VECTORS[kind] * padded * padded // 1024))
    with torch.cuda.device(start.device) if start.is_cuda else nullcontext():
        grid = (batch * count,)
        all_chunks[grid](tensors, start, scales, begun, ends[0], ends[0], *numbers, **options, is_first=True)
        if count <= 2:  # the second chunk's guess begins with the first step
            return ends[0][:, -1]
        for handed, ended in pairwise(ends):
            all_chunks[grid](tensors, start, scales, begun, handed, ended, *numbers, **options, is_first=False)
        one_after_another[(batch,)](tensors, scales, begun, ends[-1], *numbers, **options, block=16)
    return ends[-1][:, -1]


class KernelScan(torch.autograd.Function):
    """A recurrence of `VECTORS` in float32: `(batch, time, features)` -> states `(batch, time, hidden)`.

    Starts from state and memory `(batch, 2, hidden)`, and gives an LSTM's last memory besides, `(batch, hidden)`.
    `keep` says whether there will be a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        keep: bool,
        x: Tensor,
        w_in: Tensor,
        w_hidden: Tensor,
        b_in: Tensor,
        b_hidden: Tensor,
        start: Tensor,
    ) -> tuple[Tensor, Tensor]:
        size = w_hidden.shape[1]
        bias = b_in + b_hidden
        if kind == "gru":  # the reset gate multiplies the last part of its recurrent bias
            bias = torch.cat([bias[: 2 * size], b_in[2 * size :]])
        weight, start = w_hidden.contiguous(), start.contiguous()
        states = x.new_empty(*x.shape[:2], size)
        memories = torch.empty_like(states) if kind == "lstm" else states
        keep = keep and VECTORS[kind] > 1
        kept = x.new_empty(*x.shape[:2], VECTORS[kind] * size) if keep else states
        inputs = F.linear(x, w_in, bias).contiguous()
        tensors = (inputs, weight, b_hidden[2 * size :].contiguous(), start, states, memories, kept, states)
        last = _settle(kind, start, x.new_zeros(len(x)), tensors, keep=keep)
        ctx.kind = kind
        ctx.save_for_backward(x, w_in, weight, start, states, memories, kept)
        return states, last[:, 1].clone()  # without the memory around it

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor, grad_memory: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, weight, start, states, memories, kept = ctx.saved_tensors
        kind, size = ctx.kind, states.shape[2]
        grad, origin = grad.contiguous(), start[:, 1 if kind == "lstm" else 0].contiguous()
        deltas = states.new_empty(*states.shape[:2], VECTORS[kind] * size)
        carry = torch.stack([torch.zeros_like(grad_memory), grad_memory], dim=1)
        scales = torch.linalg.vector_norm(grad.flatten(1), torch.inf, dim=1)
        tensors = (grad, weight, weight, origin, states, memories, kept, deltas)
        grad_start = _settle(kind, carry, scales, tensors, backward=True)

        rows, before = deltas.flatten(0, 1), torch.cat([start[:, :1], states[:, :-1]], dim=1)
        grad_w_in, grad_w_hidden = rows.t() @ x.flatten(0, 1), rows.t() @ before.flatten(0, 1)
        grad_b_in = grad_b_hidden = rows.sum(0)
        if kind == "gru":  # the third of its four vectors is for the input alone, the last for the state alone
            rows = rows[:, : 3 * size]
            grad_w_in, grad_b_in = grad_w_in[: 3 * size], grad_b_in[: 3 * size]
            grad_w_hidden, grad_b_hidden = (
                torch.cat([part[: 2 * size], part[3 * size :]]) for part in (grad_w_hidden, grad_b_hidden)
            )
        return None, None, (rows @ w_in).view_as(x), grad_w_in, grad_w_hidden, grad_b_in, grad_b_hidden, grad_start
