"""Run adapters and solvers in float32 (or float64), regardless of autocast and of the weights' dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


_NOTHING = nullcontext()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What is computed in where something is of `dtype`."""
    return dtype if dtype == torch.float32 else torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on `device` keep the dtypes of their arguments."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


def backward_without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an autograd function in the dtypes of its arguments, wherever it's called."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor, *grads: Tensor) -> Any:
        with without_autocast(grad.device):
            return backward(ctx, grad, *grads)

    return run


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """`module(x)` in the dtype of `x`."""
    if module.weight.dtype == x.dtype:
        return module(x)
    with weights_at_hand(module):
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, module.weight.to(x.dtype), bias)


def layer_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    """`module(x)` in the dtype of `x`."""
    if module.weight.dtype == x.dtype:
        return module(x)
    with weights_at_hand(module):
        weight, bias = module.weight.to(x.dtype), module.bias.to(x.dtype)
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Let accelerate fetch the weights of a module that isn't called, where it keeps them elsewhere in between."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
