"""What an adapted layer must know of the running forward and isn't passed: padding, cache, the shape of the batch.

Each model that owns adapted layers has one `ForwardContext`. Its hooks note what a call of that model was given, and
forget it when the call ends; the layers look at the newest call that runs in their thread.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .targets import is_causal


_ATTRIBUTE = "_read_forward_context"
# Where transformers' blocks, and torch's own checkpoint wrapper, keep the function that checkpoints them.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass(frozen=True)
class ForwardCall:
    """What one running forward was given that matters to a recurrence over its tokens.

    Attributes:
        causal: whether the model's tokens see only earlier ones.
        tokens_shape: `(batch, time)` of the tokens, None if the model was given none.
        continues_cache: whether earlier tokens are in a cache, or may be: a cache that can't tell counts as filled.
        backward: number of the backward pass in which the call was made, -1 outside of one.
    """

    causal: bool
    tokens_shape: tuple[int, int] | None
    continues_cache: bool
    attention_mask: Any
    position_ids: Any
    cu_seq_lens: Any
    backward: int

    @classmethod
    def of(cls, arguments: dict[str, Any], *, causal: bool) -> ForwardCall:
        """Read the arguments of a forward, at its start: later its cache already holds its own tokens."""
        given = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        tokens = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
        return cls(
            causal=causal,
            tokens_shape=None if tokens is None else (tokens.shape[0], tokens.shape[1]),
            continues_cache=_is_filled(arguments.get("past_key_values")),
            attention_mask=arguments.get("attention_mask"),
            position_ids=arguments.get("position_ids"),
            cu_seq_lens=arguments.get("cu_seq_lens_q"),
            backward=_backward_pass(),
        )

    @cached_property
    def is_packed(self) -> bool:
        """Whether several sequences lie in one row, as padding-free collators put them there."""
        if self.cu_seq_lens is not None:
            return True
        positions = self.position_ids
        if self.attention_mask is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
            return False
        return self.causal and bool((positions.diff(dim=1) != 1).any())  # where transformers separates them as well

    @cached_property
    def mask(self) -> Tensor | None:
        """`(batch, time)`, bool, true where a token is valid; None if all are.

        Raises:
            ValueError: if the model was given a mask of another form.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(
                f"READ must know which tokens are padding and can't read it off an `attention_mask` of {form}: pass "
                "one of shape (batch, time), 1 where a token is valid."
            )
        if mask.is_floating_point() and bool((mask < 0).any()):
            raise ValueError(
                "READ must know which tokens are padding and takes `attention_mask` as 1 for valid tokens and 0 for "
                "padding; this one has negative values."
            )
        # One look at the values for all layers of this call; models of transformers take one of their own.
        return None if bool(mask.all()) else mask != 0


class ForwardContext:
    """The running calls of one model, kept by hooks on it, one stack a thread.

    Made by `attach`, once per model. Holds nothing between calls; a copied or unpickled model gets one of its own,
    which its layers share.
    """

    def __init__(self, causal: bool) -> None:
        self._causal = causal
        self._running = threading.local()
        self._handles: list[RemovableHandle] = []
        self._argument_names: list[str] = []

    @classmethod
    def attach(cls, owner: nn.Module) -> ForwardContext:
        """The context of `owner`, made and hooked in where there is none yet."""
        context: ForwardContext | None = owner.__dict__.get(_ATTRIBUTE)
        if context is None:
            context = cls(is_causal(owner))
            context._argument_names = [
                name
                for name, parameter in inspect.signature(owner.forward).parameters.items()
                if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            ]
            context._handles = [
                owner.register_forward_pre_hook(context._enter, with_kwargs=True),
                owner.register_forward_hook(context._leave, always_call=True),
            ]
            setattr(owner, _ATTRIBUTE, context)
        return context

    @staticmethod
    def detach(owner: nn.Module) -> None:
        """Take everything that `attach` and the calls since have put on `owner` off again."""
        context: ForwardContext | None = owner.__dict__.pop(_ATTRIBUTE, None)
        if context is None:
            return
        for handle in context._handles:
            handle.remove()
        for module in owner.modules():
            for attribute in _CHECKPOINT_ATTRIBUTES:
                if attribute in module.__dict__:
                    setattr(module, attribute, _without_context(module.__dict__[attribute], context))

    def running(self) -> ForwardCall | None:
        """The newest call of the model that runs in this thread.

        Raises:
            RuntimeError: if none runs because a checkpoint recomputes a layer by itself.
        """
        call = self._stack[-1] if self._stack else None
        # A forward that was interrupted from the keyboard leaves its call behind, which a backward pass mustn't take.
        if call is not None and call.backward == _backward_pass():
            return call
        if _backward_pass() != -1:
            raise RuntimeError(
                "A READ layer is recomputed in the backward pass by a checkpoint that it doesn't know of, so that it "
                "can't tell which tokens are padding. Use the model's own `gradient_checkpointing_enable()`."
            )
        return call

    @contextmanager
    def resumed(self, call: ForwardCall) -> Iterator[None]:
        """Let `call` be the running one, when a part of it is computed again."""
        self._stack.append(replace(call, backward=_backward_pass()))
        try:
            yield
        finally:
            self._stack.pop()

    @property
    def _stack(self) -> list[ForwardCall]:
        if not hasattr(self._running, "stack"):
            self._running.stack = []
        return self._running.stack

    def _enter(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if owner.training and torch.is_grad_enabled():
            self._follow_checkpoints(owner)
        arguments = dict(zip(self._argument_names, args, strict=False)) | kwargs
        self._stack.append(ForwardCall.of(arguments, causal=self._causal))

    def _leave(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._stack:  # empty if another pre-hook failed before ours
            self._stack.pop()

    def _follow_checkpoints(self, owner: nn.Module) -> None:
        # At each forward: checkpointing may be switched on at any time.
        for module in owner.modules():
            for attribute in _CHECKPOINT_ATTRIBUTES:
                function = module.__dict__.get(attribute)
                if function is not None and _without_context(function, self) is function:
                    setattr(module, attribute, _CheckpointInContext(self, function))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _running=threading.local())


class _CheckpointInContext:
    """A checkpoint function that recomputes under the call whose forward it ran in."""

    def __init__(self, context: ForwardContext, checkpoint: Callable[..., Any]) -> None:
        self.context = context
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.context.running()
        if call is None:
            return self.checkpoint(function, *args, **kwargs)

        def in_call(*args: Any, **kwargs: Any) -> Any:
            with self.context.resumed(call):
                return function(*args, **kwargs)

        return self.checkpoint(in_call, *args, **kwargs)


def _without_context(function: Callable[..., Any], context: ForwardContext) -> Callable[..., Any]:
    """`function` itself, unless it was made to recompute under calls of `context`: then what it was before."""
    if not isinstance(function, _CheckpointInContext):
        return function
    inner = _without_context(function.checkpoint, context)
    if function.context is context:
        return inner
    return function if inner is function.checkpoint else _CheckpointInContext(function.context, inner)


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # a tuple of tensors, as older models have it
        return len(cache) > 0
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # no layer of this cache counts its tokens
        return True
