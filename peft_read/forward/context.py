"""How an adapted layer learns of the forward that runs around it: hooks on the model that owns the layer.

Each model that owns adapted layers has one `ForwardContext`. Its hooks note what a call of that model was given, and
forget it when the call ends; the layers look at the newest call that runs in their thread.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from . import arguments as names
from .call import ForwardCall, RunningForward, backward_pass
from .decoding import leave_states
from .states_beside_cache import follow


_ATTRIBUTE = "_read_forward_context"
_RECORDED = "_read_records_calls"
# What a model is asked for without being called: by `model.forward(...)`, and for the features of one of its towers.
_METHODS = ("forward", "get_image_features", "get_video_features", "get_audio_features", "get_text_features")
# Where transformers' blocks, and torch's own checkpoint wrapper, keep the function that checkpoints them.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class ForwardContext:
    """The running forwards of one model, kept by hooks on it, one stack a thread.

    Made by `attach`, once per model. Holds nothing between calls; a copied or unpickled model gets one of its own,
    which its layers share.

    Attributes:
        is_required: whether its layers run inside of a call of the model alone, as those of transformers' models do.
    """

    def __init__(self, causal: bool, owner_class: type[nn.Module] = nn.Module) -> None:
        self.is_required = issubclass(owner_class, PreTrainedModel)
        self._owner_class = owner_class
        self._causal = causal
        self._running = threading.local()
        self._handles: list[RemovableHandle] = []
        # Of the model ("") and of the parts that are watched: by position, and those masks that they can be given.
        self._argument_names: dict[str, list[str]] = {}
        self._mask_names: dict[str, list[str]] = {}
        self._recurrences: set[str] = set()
        self._has_warned = False
        self._was_described = False

    @classmethod
    def attach(cls, owner: nn.Module, *, causal: bool) -> ForwardContext:
        """The context of `owner`, made and hooked in where there is none yet.

        Args:
            owner: the model.
            causal: whether its tokens see only earlier ones.
        """
        context: ForwardContext | None = owner.__dict__.get(_ATTRIBUTE)
        if context is None:
            context = cls(causal, type(owner))
            context._know_arguments("", owner)
            context._handles = [
                owner.register_forward_pre_hook(context._enter_call, with_kwargs=True),
                owner.register_forward_hook(context._leave_call, always_call=True),
            ]
            setattr(owner, _ATTRIBUTE, context)
            _record_methods(type(owner))
            follow(Cache)
        return context

    def watch(self, owner: nn.Module, target: nn.Module) -> str | None:
        """Note from now on what a part of the model is given: some models make a mask of their own there (wav2vec2).

        Args:
            owner: the model.
            target: the module in it that is going to be adapted.

        Returns:
            Name of the outermost part around that module which takes a mask; `""` for a model of one's own that takes
            one of torch's itself, where no part of it does; None if there is none.
        """
        path = next(name for name, module in owner.named_modules() if module is target)
        parts = path.split(".")[:-1]
        for name in itertools.accumulate(parts, "{}.{}".format):
            module = owner.get_submodule(name)
            if name not in self._mask_names:
                self._know_arguments(name, module)
                if self._takes_a_mask(name):
                    self._handles += [
                        module.register_forward_pre_hook(partial(self._enter_part, name), with_kwargs=True),
                        module.register_forward_hook(partial(self._leave_part, name), always_call=True),
                    ]
            if self._takes_a_mask(name):
                return name
        return "" if not self.is_required and self._takes_a_mask("") else None

    def _know_arguments(self, name: str, module: nn.Module) -> None:
        parameters = _parameters(type(module).forward)
        self._argument_names[name] = _positional(parameters)
        self._mask_names[name] = [p.name for p in parameters if p.name in names.OF_PARTS]

    def _takes_a_mask(self, name: str) -> bool:
        return not {"attention_mask", *names.PADDING_MASKS}.isdisjoint(self._mask_names[name])

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

    def running(self) -> RunningForward | None:
        """The newest forward of the model that runs in this thread.

        Raises:
            RuntimeError: if none runs because a checkpoint recomputes a layer by itself.
        """
        stack, backward = self._stack, backward_pass()
        running = stack[-1] if stack else None
        # A forward that was interrupted from the keyboard leaves its call behind, which a backward pass mustn't take.
        if running is not None and running.backward == backward:
            return running
        if backward != -1:
            raise RuntimeError(
                "A READ layer is recomputed in the backward pass by a checkpoint that it doesn't know of, so that it "
                "can't tell which tokens are padding. Use the model's own `gradient_checkpointing_enable()`."
            )
        return running

    @contextmanager
    def resumed(self, running: RunningForward) -> Iterator[None]:
        """Let a forward be the running one where a checkpoint runs a part of it."""
        self._stack.append(running.again())
        try:
            yield
        finally:
            self._stack.pop()

    def warn_of_masks(self, unread: tuple[str, ...]) -> None:
        """Say once that a model of one's own was given masks that READ doesn't read."""
        self._warn(
            f"the model was given {', '.join(unread)}, which READ doesn't read; it reads "
            f"{', '.join((*names.MASKS, *names.PADDING_MASKS))}."
        )

    def warn_of_no_call(self, module_name: str) -> None:
        """Say once that a layer ran without a call of the model of one's own that it is in."""
        self._warn(
            f"{module_name} runs outside of a call of its model, by another method perhaps, so that READ sees no mask."
        )

    def _warn(self, reason: str) -> None:
        if not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = True
            warnings.warn(
                f"READ takes all tokens as valid, but {reason} If tokens are padded, say which are valid around the "
                "call: `with peft_read.describe_tokens(valid): ...`; if none are, `with peft_read.describe_tokens(): "
                "...`.",
                stacklevel=2,
            )

    @property
    def _stack(self) -> list[RunningForward]:
        if not hasattr(self._running, "stack"):
            self._running.stack = []
        return self._running.stack

    @property
    def _awaited(self) -> list[nn.Module]:
        """Modules that were called, whose forward is about to run."""
        if not hasattr(self._running, "awaited"):
            self._running.awaited = []
        return self._running.awaited

    def _enter_call(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(owner, self._arguments("", args, kwargs))
        self._awaited.append(owner)

    def _leave_call(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if owner in self._awaited:  # its forward was another than its class's
            self._awaited.remove(owner)
        if self._stack:  # empty if another pre-hook failed before ours
            self._leave(output)

    def _enter(self, owner: nn.Module, arguments: dict[str, Any]) -> None:
        if owner.training and torch.is_grad_enabled():
            self._follow_checkpoints(owner)
        call = ForwardCall.of(owner, arguments, causal=self._causal)
        if self._was_described and not call.described and backward_pass() != -1:
            raise RuntimeError(
                "A checkpoint runs a call of a model with READ again in the backward pass, where the description of "
                "its tokens has ended. Put `with peft_read.describe_tokens(...)` inside of the function that is "
                "checkpointed."
            )
        self._was_described |= bool(call.described)
        running = RunningForward.of(call)
        running.parts[""] = self._masks_of("", arguments)
        self._stack.append(running)

    def _leave(self, output: Any) -> None:
        running = self._stack.pop()
        if output is not None:  # None after an exception
            leave_states(running, output, self._recurrences)

    def _enter_part(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._arguments(name, args, kwargs)
        if not self._stack and not self.is_required and backward_pass() == -1:
            # By a method of the model's that no hook sees, or alone.
            call = replace(ForwardCall.of(module, arguments, causal=self._causal), mask=None)
            self._stack.append(RunningForward.of(call, is_of=name))
        if self._stack:
            self._stack[-1].parts[name] = self._masks_of(name, arguments)

    def _leave_part(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._stack and self._stack[-1].is_of == name:
            self._leave(output)

    def _masks_of(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {kept: arguments.get(kept) for kept in self._mask_names[name]}

    def _arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._argument_names[name], args, strict=False)) | kwargs

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
        _record_methods(self._owner_class)  # in the process that loads a pickled model


def _record_methods(cls: type[nn.Module]) -> None:
    """Let `model.forward(...)` and the like be recorded as a call of the model is; hooks see calls alone.

    The methods of the model's class are wrapped, once, since methods on the single model would be lost on copies and
    on the replicas of `nn.DataParallel`. For models without a context nothing changes.
    """
    if cls.__module__.partition(".")[0] == "torch":
        return
    for name in _METHODS:
        method = getattr(cls, name, None)
        if method is not None and not hasattr(method, _RECORDED):
            setattr(cls, name, _recorded(name, method))


def _recorded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    argument_names = _positional(_parameters(method))

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context: ForwardContext | None = self.__dict__.get(_ATTRIBUTE)
        if context is None or getattr(type(self), name) is not run:  # a subclass's method calls this one
            return method(self, *args, **kwargs)
        if name == "forward" and context._awaited and context._awaited[-1] is self:
            context._awaited.pop()
            return method(self, *args, **kwargs)
        context._enter(self, dict(zip(argument_names, args, strict=False)) | kwargs)
        output = None
        try:
            output = method(self, *args, **kwargs)
        finally:
            context._leave(output)
        return output

    setattr(run, _RECORDED, True)
    return run


class _CheckpointInContext:
    """A checkpoint function that recomputes under the call whose forward it ran in."""

    def __init__(self, context: ForwardContext, checkpoint: Callable[..., Any]) -> None:
        self.context = context
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self.context.running()
        if running is None:
            return self.checkpoint(function, *args, **kwargs)
        running = running.so_far()

        def in_call(*args: Any, **kwargs: Any) -> Any:
            with self.context.resumed(running):
                return function(*args, **kwargs)

        return self.checkpoint(in_call, *args, **kwargs)


def _without_context(function: Callable[..., Any], context: ForwardContext) -> Callable[..., Any]:
    """Undo `_CheckpointInContext` for this context."""
    if not isinstance(function, _CheckpointInContext):
        return function
    inner = _without_context(function.checkpoint, context)
    if function.context is context:
        return inner
    return function if inner is function.checkpoint else _CheckpointInContext(function.context, inner)


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """A method's arguments. Of the class's: accelerate puts one of its own on an instance."""
    return list(inspect.signature(method).parameters.values())[1:]


def _positional(parameters: list[inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
