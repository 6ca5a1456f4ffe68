"""The scan of one recurrence, in one direction, where every step is valid, by the fastest path that there is for it.

It runs parallel in time: on CUDA by this package's Triton kernels, on CPU (the vanilla and the gated recurrence) by
torch's operations. Everything else goes through torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import passes_trial, triton_runs
from .chunked_cpu import GatedScan, VanillaScan


GATES: dict[str, int] = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
CUDNN: Any = torch.backends.cudnn.rnn  # torch's settings for it, more than a module's attributes
WIDEST_KERNEL = 128  # states, whose recurrent matrix fits into a program's registers
TRIAL_STEPS = 100  # some chunks, of which the last wait for others


def scan_eagerly(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor] | None) -> list[Tensor]:
    """See `scan`."""
    if x.shape[1] > 1 and _runs_by_kernel(kind, x, weights[1].shape[1]):
        return _scan_by_kernel(kind, x, weights, start)
    if start is None:
        start = zero_states(kind, x, weights)
    if x.shape[1] == 1:
        return _step(kind, x.squeeze(1), weights, start)
    if x.device.type == "cpu" and kind in ("rnn_tanh", "gru"):
        return _scan_in_parallel(kind, x, weights, start)
    return _scan_by_torch(kind, x, weights, start)


def zero_states(kind: str, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The states that a scan starts from by default."""
    return [x.new_zeros(1, x.shape[0], weights[1].shape[1])] * (2 if kind == "lstm" else 1)


def _step(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """One step alone, as in decoding."""
    states = [part.squeeze(0) for part in start]
    if kind == "lstm":
        states = list(torch.lstm_cell(x, states, *weights))
    else:
        states = [getattr(torch, f"{kind}_cell")(x, states[0], *weights)]
    return [states[0].unsqueeze(1), *(part.unsqueeze(0) for part in states)]


def _runs_by_kernel(kind: str, x: Tensor, width: int) -> bool:
    """Whether the Triton kernels are to be used, see `triton_runs`."""
    lacks = None
    if x.dtype != torch.float32:
        lacks = f"a computation in float32, and this is in {x.dtype}"
    elif width > WIDEST_KERNEL:
        lacks = f"at most {WIDEST_KERNEL} states, and the recurrence has {width}"
    return triton_runs(x, lacks, lambda: _passes_trial(kind, max(16, 1 << (width - 1).bit_length()), x.device))


@cache
def _passes_trial(kind: str, size: int, device: torch.device) -> bool:
    """Whether the kernels give on a GPU what torch's do, see `passes_trial`.

    The trial has as many states as those that are to be run, padded: so it tries, and compiles, their very kernels.
    """

    def compare() -> list[tuple[Tensor, Tensor]]:
        rows, results = GATES[kind] * size, []
        with torch.inference_mode(False), torch.enable_grad():
            for run, dtype in ((_scan_by_kernel, torch.float32), (_scan_by_torch, torch.float64)):
                inputs, *weights = (
                    torch.arange(count, dtype=dtype, device=device).mul_(40 + i).sin_()
                    for i, count in enumerate((2 * TRIAL_STEPS * size, rows * size, rows * size))
                )
                x = inputs.view(2, TRIAL_STEPS, size).requires_grad_()
                matrices = [weight.view(rows, size) / size**0.5 for weight in weights]
                outputs = run(kind, x, [*matrices, *x.new_ones(2, rows).detach()], None)[0]
                results.append([outputs.detach(), *torch.autograd.grad(outputs.square().sum(), x)])
        return list(zip(*results, strict=True))

    return passes_trial(device, compare)


def _scan_by_kernel(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor] | None) -> list[Tensor]:
    from .chunked_triton import KernelScan  # triton isn't everywhere

    biases: Sequence[Tensor | None] = weights[2:] or (None, None)
    hidden, memory = (*(part[0] for part in start or ()), None, None)[:2]
    states, memory = KernelScan.apply(kind, torch.is_grad_enabled(), x, *weights[:2], *biases, hidden, memory)
    final = states.select(1, -1).unsqueeze(0)
    return [states, final] if memory is None else [states, final, memory.unsqueeze(0)]


def _scan_in_parallel(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    function = GatedScan if kind == "gru" else VanillaScan
    states = function.apply(x, *_with_biases(weights), start[0])
    return [states, states[None, :, -1]]


def _with_biases(weights: list[Tensor]) -> list[Tensor]:
    rows = weights[1].shape[0]
    return weights if len(weights) == 4 else [*weights, *weights[1].new_zeros(2, rows)]


def _scan_by_torch(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor] | None) -> list[Tensor]:
    start = zero_states(kind, x, weights) if start is None else start
    if x.is_cuda and x.dtype == torch.float32 and CUDNN.fp32_precision == "tf32":
        return list(_WithoutTF32.apply(kind, len(start), x, *start, *weights))
    return _run_torch(kind, x, weights, start)


def _run_torch(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    if x.is_cuda:  # cuDNN wants the weights behind each other in memory; a copy made here is one that it needn't make
        chunk = torch.cat([weight.flatten() for weight in weights])
        parts = chunk.split([weight.numel() for weight in weights])
        weights = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
    # `train=True` keeps what the backward pass needs: cuDNN refuses it for a cell in eval mode otherwise.
    rest = (weights, len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, True)
    initial = [part.contiguous() for part in start]
    kernel = getattr(torch, kind)
    return list(kernel(x, initial if kind == "lstm" else initial[0], *rest))


class _WithoutTF32(torch.autograd.Function):
    """`_run_torch` in float32: cuDNN may round every factor of a product to TF32 otherwise, as torch lets it.

    The backward pass obeys the setting of its own time, long after the forward pass. So this function keeps the graph
    of the forward pass to itself, and runs it with the setting that it needs.
    """

    @staticmethod
    def forward(ctx: Any, kind: str, states: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(any(ctx.needs_input_grad)), _tf32_forbidden():
            leaves = [
                tensor.detach().requires_grad_(needed)
                for tensor, needed in zip((x, *tensors), ctx.needs_input_grad[2:], strict=True)
            ]
            outputs = _run_torch(kind, leaves[0], leaves[1 + states :], leaves[1 : 1 + states])
        ctx.leaves, ctx.outputs = leaves, outputs
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(output, grad) for output, grad in zip(ctx.outputs, grads, strict=True) if grad is not None]
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        outputs, grads = zip(*given, strict=True)
        with _tf32_forbidden():
            # The graph stays for whoever runs backward twice; it goes when this function's own node does.
            found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=True))
        return None, None, *(next(found) if leaf.requires_grad else None for leaf in ctx.leaves)


@contextmanager
def _tf32_forbidden() -> Iterator[None]:
    before = CUDNN.fp32_precision
    CUDNN.fp32_precision = "ieee"
    try:
        yield
    finally:
        CUDNN.fp32_precision = before
