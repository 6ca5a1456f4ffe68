"""How an adapted layer learns what it isn't passed: the padding, the cache, the shape of the batch.

Each model that owns adapted layers has one `ForwardContext`. Its hooks note what a call of that model was given, and
forget it when the call ends; the layers look at the newest call that runs in their thread.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .call import ForwardCall, backward_pass
from .targets import is_causal


_ATTRIBUTE = "_read_forward_context"
# Where transformers' blocks, and torch's own checkpoint wrapper, keep the function that checkpoints them.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class ForwardContext:
    """The running calls of one model, kept by hooks on it, one stack a thread.

    Made by `attach`, once per model. Holds nothing between calls; a copied or unpickled model gets one of its own,
    which its layers share.
    """

    def __init__(self, causal: bool) -> None:
        self._causal = causal
        self._running = threading.local()
        self._handles: list[RemovableHandle] = []
        self._argument_names: dict[str, list[str]] = {}  # of the model (""), and of the parts that are watched
        self._recurrences: set[str] = set()

    @classmethod
    def attach(cls, owner: nn.Module) -> ForwardContext:
        """The context of `owner`, made and hooked in where there is none yet."""
        context: ForwardContext | None = owner.__dict__.get(_ATTRIBUTE)
        if context is None:
            context = cls(is_causal(owner))
            context._argument_names[""] = _positional_names(owner)
            context._handles = [
                owner.register_forward_pre_hook(context._enter, with_kwargs=True),
                owner.register_forward_hook(context._leave, always_call=True),
            ]
            setattr(owner, _ATTRIBUTE, context)
        return context

    def watch(self, owner: nn.Module, target: nn.Module) -> str | None:
        """Note from now on the mask that a part of the model is given: some make one of their own there (wav2vec2).

        Args:
            owner: the model.
            target: the module in it that is going to be adapted.

        Returns:
            Name of the outermost part around that module which takes a mask, None if there is none.
        """
        path = next(name for name, module in owner.named_modules() if module is target)
        parts = path.split(".")[:-1]
        for name in itertools.accumulate(parts, "{}.{}".format):
            module = owner.get_submodule(name)
            if "attention_mask" not in (names := _positional_names(module)):
                continue
            if name not in self._argument_names:
                self._argument_names[name] = names
                note = partial(self._note_mask, name)
                self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            return name
        return None

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
        if call is not None and call.backward == backward_pass():
            return call
        if backward_pass() != -1:
            raise RuntimeError(
                "A READ layer is recomputed in the backward pass by a checkpoint that it doesn't know of, so that it "
                "can't tell which tokens are padding. Use the model's own `gradient_checkpointing_enable()`."
            )
        return call

    @contextmanager
    def resumed(self, call: ForwardCall) -> Iterator[None]:
        """Let `call` be the running one, when a part of it is computed again."""
        self._stack.append(replace(call, backward=backward_pass()))
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
        arguments = self._arguments("", args, kwargs)
        self._stack.append(ForwardCall.of(owner, arguments, causal=self._causal, recurrences=self._recurrences))

    def _note_mask(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stack:
            self._stack[-1].inner_masks[name] = self._arguments(name, args, kwargs).get("attention_mask")

    def _arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._argument_names[name], args, strict=False)) | kwargs

    def _leave(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._stack:  # empty if another pre-hook failed before ours
            call = self._stack.pop()
            if output is not None:  # None after an exception
                call.finish(output)

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


def _positional_names(module: nn.Module) -> list[str]:
    # Of the class: accelerate puts a function of its own in place of an instance's forward.
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
