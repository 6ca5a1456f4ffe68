"""The scan of one recurrence, in one direction, where every step is valid.

It runs parallel in time: on CUDA by a kernel of this package, on CPU (the vanilla and the gated recurrence) by torch's
operations. Everything else goes through torch's own kernels. Compiled models see the whole scan as one operator.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .parallel import GatedScan, VanillaScan


GATES: dict[str, int] = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
SWITCH = "PEFT_READ_SCAN"  # environment variable that forces what else is chosen by device, see `recurrent_scan`
WIDEST_KERNEL = 128  # states, whose recurrent matrix fits into a program's registers


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
    if _runs_by_kernel(x, start[0].shape[1]):
        return _scan_by_kernel(kind, x, weights, start)
    if x.device.type == "cpu" and kind in ("rnn_tanh", "gru"):
        return _scan_in_parallel(kind, x, weights, start)
    return _scan_by_torch(kind, x, weights, start)


def _step(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """One step alone, as in decoding."""
    cell = getattr(torch, f"{kind}_cell")
    state = cell(x, start if kind == "lstm" else start[0], *weights)
    states = list(state) if kind == "lstm" else [state]
    return [states[0][:, None], *states]


def _runs_by_kernel(x: Tensor, width: int) -> bool:
    """Whether the Triton kernel is to be used.

    Raises:
        ValueError: if the switch has another value than `auto`, `torch` and `triton`, or forces the kernel upon what
            it can't run.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"The environment variable {SWITCH} must be auto, torch or triton, got {choice!r}.")
    if choice == "torch":
        return False
    lacks = None
    if not _has_triton():
        lacks = "the package triton, which isn't installed"
    elif not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        lacks = f"a GPU, and the adapter is on {x.device}"
    elif x.dtype != torch.float32:
        lacks = f"a computation in float32, and this is in {x.dtype}"
    elif width > WIDEST_KERNEL:
        lacks = f"at most {WIDEST_KERNEL} states, and the recurrence has {width}"
    if choice == "triton" and lacks is not None:
        raise ValueError(f"{SWITCH}=triton needs {lacks}. Unset it to let the device decide.")
    return lacks is None and (x.is_cuda or choice == "triton")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _scan_by_kernel(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    from .kernel_scan import KernelScan  # triton isn't everywhere

    memory = start[1] if kind == "lstm" else torch.zeros_like(start[0])
    states, memory = KernelScan.apply(kind, x, *_with_biases(weights), torch.stack([start[0], memory], dim=1))
    return [states, states[:, -1], memory][: len(start) + 1]


def _scan_in_parallel(kind: str, x: Tensor, weights: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    function = GatedScan if kind == "gru" else VanillaScan
    states = function.apply(x, *_with_biases(weights), start[0])
    return [states, states[:, -1]]


def _with_biases(weights: list[Tensor]) -> list[Tensor]:
    rows = weights[1].shape[0]
    return weights if len(weights) == 4 else [*weights, *weights[1].new_zeros(2, rows)]


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
