"""What an adapted layer must know of the running forward and isn't passed: padding, cache, the shape of the batch.

Each model that owns adapted layers has one `ForwardContext`. Its hooks note what a call of that model was given, and
forget it when the call ends; the layers look at the newest call that runs in their thread.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .decoding import (
    RecurrentStates,
    StateHistory,
    cached_length,
    capacity_of,
    foreign_cache,
    self_attention_cache,
)
from .masks import NAMES, valid_tokens
from .targets import is_causal


_ATTRIBUTE = "_read_forward_context"
# Where transformers' blocks, and torch's own checkpoint wrapper, keep the function that checkpoints them.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass
class ForwardCall:
    """What one running forward was given that matters to a recurrence over its tokens.

    Attributes:
        causal: whether the model's tokens see only earlier ones.
        tokens_shape: `(batch, time)` of the tokens, None if the model was given none.
        mask: the model's own mask, in whatever form; None if it has none.
        inner_masks: what parts of the model were given, such as the encoder above the adapted blocks, by their names.
        pads_right: whether the model pads its tokens on the right to a whole number of windows.
        cache: the cache that counts the model's own tokens, if one was passed.
        past: tokens in it before this call, a tensor if its size is fixed; None if it doesn't count them.
        is_paged: whether requests share the cache page by page (continuous batching).
        foreign_cache: name of an argument that holds states of earlier tokens in another way, None if none does.
        position_ids: the positions, if they were passed.
        cu_seq_lens: where packed sequences start and end, if that was passed.
        backward: number of the backward pass in which the call was made, -1 outside of one.
        recurrences: names of those that have left states in some call of the model.
        states: what the recurrences of this call leave for the next, by name.
        partial: which of them have states of some rows only; the others hold NaN.
    """

    causal: bool
    tokens_shape: tuple[int, int] | None
    mask: Any
    pads_right: bool
    cache: Any
    past: int | Tensor | None
    is_paged: bool
    foreign_cache: str | None
    position_ids: Any
    cu_seq_lens: Any
    backward: int
    recurrences: set[str] = field(default_factory=set)
    inner_masks: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    _valid: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, owner: nn.Module, arguments: dict[str, Any], **known: Any) -> ForwardCall:
        """Read the arguments of a forward, at its start: later its cache already holds its own tokens."""
        given = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        tokens = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
        cache = self_attention_cache(arguments.get("past_key_values"))
        return cls(
            **known,
            tokens_shape=None if tokens is None else (tokens.shape[0], tokens.shape[1]),
            mask=next((mask for name in NAMES if (mask := _without_empty(arguments.get(name))) is not None), None),
            pads_right=hasattr(getattr(owner, "config", None), "attention_window"),
            cache=cache,
            past=0 if cache is None else cached_length(cache),
            is_paged=arguments.get("write_index") is not None,
            foreign_cache=foreign_cache(arguments),
            position_ids=arguments.get("position_ids"),
            cu_seq_lens=arguments.get("cu_seq_lens_q"),
            backward=_backward_pass(),
        )

    def valid_tokens(self, shape: tuple[int, int], part: str | None) -> Tensor | None:
        """`(batch, time)`, bool, true where a token is valid; None if all are.

        Args:
            shape: `(batch, time)` of the tokens as the adapted module sees them.
            part: name of the part of the model whose mask counts where the model's own doesn't fit.

        Raises:
            ValueError: if there is a mask that isn't for these tokens.
        """
        if (shape, part) not in self._valid:
            self._valid[shape, part] = self._read_mask(shape, self.inner_masks.get(part) if part else None)
        return self._valid[shape, part]

    def _read_mask(self, shape: tuple[int, int], inner_mask: Any) -> Tensor | None:
        if self.mask is None and inner_mask is None:
            return None
        past = 0 if self.past is None else self.past
        valid = valid_tokens(self.mask, shape, past, additive=False)
        if valid is None:
            valid = valid_tokens(inner_mask, shape, past, additive=True)
        if valid is None and self.pads_right and isinstance(self.mask, Tensor) and self.mask.ndim == 2:
            missing = shape[1] - self.mask.shape[1]
            valid = nn.functional.pad(self.mask != 0, (0, missing)) if missing > 0 else None
        if valid is None:
            mask = self.mask if self.mask is not None else inner_mask
            form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(
                f"READ can't tell which tokens are padding: the model was given an attention mask of {form}, and the "
                f"adapted module's output has (batch, time) = {shape}. Pass a mask of shape (batch, time), 1 where a "
                "token is valid; leave it out if nothing is padded; or target modules that see the tokens it is about."
            )
        # One look at the values for all layers of this call; models of transformers take one of their own.
        return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid

    @cached_property
    def segments(self) -> list[int] | None:
        """Lengths of the sequences that lie in the rows one after another, None if each row is one sequence."""
        if self.tokens_shape is None or torch.compiler.is_compiling():
            return None
        batch, time = self.tokens_shape
        if isinstance(self.cu_seq_lens, Tensor):
            return self.cu_seq_lens.diff().tolist()
        positions = self.position_ids
        # Where transformers separates them as well: causal attention, no mask, no cache.
        separates = self.causal and self.mask is None and self.cache is None
        if not separates or not isinstance(positions, Tensor) or positions.ndim != 2:
            return None
        starts = torch.ones(batch, time, dtype=torch.bool, device=positions.device)
        starts[:, 1:] = positions.diff(dim=1) != 1
        if int(starts.sum()) == batch:
            return None
        edges = [*starts.flatten().nonzero()[:, 0].tolist(), batch * time]
        return [end - start for start, end in itertools.pairwise(edges)]

    def start(self, name: str, rows: Tensor | slice) -> Tensor | None:
        """The state `(rows, width)` before this call's tokens, None if these are the first.

        Args:
            name: which recurrence's.
            rows: of which rows of the batch.

        Raises:
            ValueError: if the cache holds tokens of which the recurrence has seen nothing.
        """
        if self.is_paged:
            raise ValueError(
                "READ can't run under continuous batching, which mixes the tokens of many requests in one row: use "
                "`generate` with a padded batch."
            )
        if self.foreign_cache is not None:
            raise ValueError(
                f"READ can't keep its states beside those that this model is given as `{self.foreign_cache}`: set "
                "use_cache=False."
            )
        past = self.past
        if isinstance(past, int) and past == 0:
            return None
        known = RecurrentStates.of(self.cache)
        history = known.histories.get(name) if known is not None else None
        seen = 0 if history is None else history.length
        compiling = torch.compiler.is_compiling()
        if isinstance(past, Tensor) and seen == 0 and (compiling or not bool(past > 0)):
            return None
        # A cache of fixed size has its length on the device: its histories are told when they fall behind.
        if history is None or past is None or seen < (1 if isinstance(past, Tensor) else past):
            self._refuse_cache(name, seen)
        start = history.before(past)[rows]
        if history.is_partial and not compiling and bool(start.isnan().any()):
            self._refuse_cache(name, "some rows' tokens only")
        return start

    def _refuse_cache(self, name: str, seen: int | str) -> NoReturn:
        held = "tokens that it doesn't count" if self.past is None else f"{int(self.past)} tokens"
        raise ValueError(
            f"READ ({name}) can't continue from this cache: it holds {held}, of which the recurrence has seen {seen}. "
            "Fill the cache with the same adapter active from its first token, or set use_cache=False."
        )

    def finish(self, output: Any) -> None:
        """Lay the states of this call beside the cache that it has filled, if there is one."""
        cache = self.cache if self.cache is not None else self_attention_cache(_cache_in(output))
        if cache is None or self.past is None:
            return
        known = RecurrentStates.of(cache)
        if known is not None and isinstance(self.past, Tensor):
            for name in self.recurrences & known.histories.keys():
                known.histories[name].length = 0  # until it is written below
        states = {name: compute() for name, compute in self.states.items()}
        self.recurrences.update(states)
        if not states:
            return
        time = next(iter(states.values())).shape[1]
        if isinstance(self.past, int) and cached_length(cache) != self.past + time:
            return  # passed, but not filled
        histories = RecurrentStates.beside(cache).histories
        capacity = capacity_of(cache) if isinstance(self.past, Tensor) else 0
        for name, steps in states.items():
            history = histories.setdefault(name, StateHistory())
            history.write(self.past, steps, capacity)
            history.is_partial |= name in self.partial


class ForwardContext:
    """The running calls of one model, kept by hooks on it, one stack a thread.

    Made by `attach`, once per model. Holds nothing between calls; a copied or unpickled model gets one of its own,
    which its layers share.
    """

    def __init__(self, causal: bool) -> None:
        self._causal = causal
        self._running = threading.local()
        self._handles: list[RemovableHandle] = []
        self._watched: set[str] = set()
        self._recurrences: set[str] = set()

    @classmethod
    def attach(cls, owner: nn.Module) -> ForwardContext:
        """The context of `owner`, made and hooked in where there is none yet."""
        context: ForwardContext | None = owner.__dict__.get(_ATTRIBUTE)
        if context is None:
            context = cls(is_causal(owner))
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
            if "attention_mask" not in _positional_names(type(module)):  # type: ignore[arg-type]
                continue
            if name not in self._watched:
                self._watched.add(name)
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
        arguments = _named(owner, args, kwargs)
        self._stack.append(ForwardCall.of(owner, arguments, causal=self._causal, recurrences=self._recurrences))

    def _note_mask(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stack:
            self._stack[-1].inner_masks[name] = _named(module, args, kwargs).get("attention_mask")

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


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_positional_names(type(module)), args, strict=False)) | kwargs  # type: ignore[arg-type]


@functools.cache
def _positional_names(module_cls: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(module_cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _without_empty(mask: Any) -> Any:
    """None for a dict of no masks, which generation passes where nothing is padded."""
    return None if isinstance(mask, dict) and all(kind is None for kind in mask.values()) else mask


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()


def _cache_in(output: Any) -> Any:
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, (tuple, list)):
        cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return cache
