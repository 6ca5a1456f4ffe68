"""Recurrent states that live beside a KV cache and follow it wherever generation takes it.

A cache holds what attention must know of earlier tokens; READ's recurrence must know its state after the last of them.
Each layer's states are kept for every position, so that going back to an earlier token, when a draft is rejected, is
only an index. They are narrow: `r` numbers a token and layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


_ATTRIBUTE = "_read_states"
_FOLLOWED = "_read_states_follow"
_BLOCK = 64  # steps by which a history that has become too short grows


class StateHistory:
    """The states of one recurrence over the tokens of a cache, `(batch, positions, width)`.

    Attributes:
        length: tokens of the cache whose states are known; for a `StaticCache` its capacity once it is written, 0
            before.
        is_partial: whether some rows may hold NaN, for tokens that another adapter has seen.
    """

    def __init__(self) -> None:
        self.length = 0
        self.is_partial = False
        self._steps: Tensor | None = None

    def before(self, position: int | Tensor) -> Tensor:
        """The state `(batch, width)` after the tokens before `position`; zero before the first.

        Args:
            position: number of earlier tokens; a tensor for a cache of fixed size, whose counter is one.
        """
        assert self._steps is not None
        if isinstance(position, Tensor):
            position = position.to(self._steps.device)
            index = (position - 1).clamp(min=0).reshape(1) % self._steps.shape[1]
            return torch.where(position > 0, self._steps.index_select(1, index)[:, 0], 0)
        return self._steps.select(1, position - 1) if position else torch.zeros_like(self._steps[:, 0])

    def write(self, position: int | Tensor, states: Tensor, cache: Any) -> None:
        """Put states at `position` and after, over what may be there.

        Args:
            position: as in `before`.
            states: `(batch, time, width)`.
            cache: the cache whose tokens these are.
        """
        if isinstance(position, Tensor):
            self._write_in_place(position, states, cache)
        else:
            self._write_growing(position, states)

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change the batch."""
        if self._steps is not None:
            self._steps = function(self._steps)

    def _write_in_place(self, position: Tensor, states: Tensor, cache: Any) -> None:
        if self._steps is None or len(self._steps) != len(states):
            self._steps = states.new_zeros(states.shape[0], capacity_of(cache), states.shape[2])
        capacity = self._steps.shape[1]
        # Where all layers have sliding windows there is room for fewer tokens than a prompt may have.
        time = min(states.shape[1], capacity)
        first = position.to(states.device) + states.shape[1] - time
        index = (first + torch.arange(time, device=states.device)) % capacity
        self._steps.index_copy_(1, index, states[:, -time:])
        self.length = capacity

    def _write_growing(self, position: int, states: Tensor) -> None:
        self.length = position + states.shape[1]
        steps = self._steps if position else None
        if states.requires_grad or (steps is not None and steps.requires_grad):
            self._steps = states if steps is None else torch.cat([steps[:, :position], states], dim=1)
            return
        fixed = steps is not None and steps.is_inference() and not torch.is_inference_mode_enabled()
        if steps is None or fixed or steps.shape[1] < self.length:
            longer = states.new_empty(states.shape[0], self.length + _BLOCK, states.shape[2])
            if steps is not None:
                longer[:, :position] = steps[:, :position]
            self._steps = steps = longer
        steps.narrow(1, position, states.shape[1]).copy_(states)


class RecurrentStates:
    """All histories that belong to one cache, by the name of the recurrence; copied and pickled with the cache."""

    def __init__(self) -> None:
        self.histories: dict[str, StateHistory] = {}
        self.followed: type | None = None
        self.is_following = False

    @staticmethod
    def of(cache: Any) -> RecurrentStates | None:
        """Those of `cache`, None if it has none."""
        return getattr(cache, _ATTRIBUTE, None)

    @classmethod
    def beside(cls, cache: Any) -> RecurrentStates:
        """Those of `cache`, made where it has none."""
        states = cls.of(cache)
        if states is None:
            states = cls()
            states.followed = type(cache)
            if not torch.compiler.is_compiling():
                follow(type(cache))
            setattr(cache, _ATTRIBUTE, states)
        return states

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change the batch of all histories."""
        for history in self.histories.values():
            history.map_rows(function)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.followed is not None:
            follow(self.followed)  # in the process that loads a pickled cache


def follow(cache_class: type) -> None:
    """Let the methods of a class of caches that change the batch or the tokens change the states beside one as well.

    The class's own methods are wrapped, once. Methods on the single cache would form a reference cycle with it, which
    keeps its memory until Python's collector runs, and couldn't be pickled.
    """
    for base in cache_class.__mro__:
        for name in _CHANGES:
            method = base.__dict__.get(name)
            if method is not None and not hasattr(method, _FOLLOWED):
                setattr(base, name, _followed(name, method))


def _followed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        states: RecurrentStates | None = getattr(self, _ATTRIBUTE, None)
        if states is None or states.is_following:  # a method may call its super class's, which is wrapped as well
            return method(self, *args, **kwargs)
        states.is_following = True
        try:
            result = method(self, *args, **kwargs)
        finally:
            states.is_following = False
        _CHANGES[name](states, self, *args, **kwargs)
        return result

    setattr(run, _FOLLOWED, True)
    return run


def _reorder_cache(states: RecurrentStates, cache: Any, beam_idx: Tensor) -> None:
    states.map_rows(lambda steps: steps.index_select(0, beam_idx.to(steps.device)))


def _batch_repeat_interleave(states: RecurrentStates, cache: Any, repeats: int) -> None:
    states.map_rows(lambda steps: steps.repeat_interleave(repeats, dim=0))


def _batch_select_indices(states: RecurrentStates, cache: Any, indices: Tensor) -> None:
    states.map_rows(lambda steps: steps[indices.to(steps.device)])


def _crop(states: RecurrentStates, cache: Any, *args: Any, **kwargs: Any) -> None:
    length = cached_length(cache)
    for history in states.histories.values():
        if isinstance(length, int):
            history.length = min(history.length, length)


def _reset(states: RecurrentStates, cache: Any) -> None:
    for history in states.histories.values():
        history.length = 0


# What is done to a cache, and to the states beside it.
_CHANGES: dict[str, Callable[..., None]] = {
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "crop": _crop,
    "reset": _reset,
}


def cached_length(cache: Any) -> int | Tensor | None:
    """Tokens in a cache: a number, or a copy of a fixed-size cache's counter; None if it doesn't count them."""
    try:
        length = cache.get_seq_length()
    except ValueError:  # only layers of linear attention
        return None
    if length is None:  # Reformer's
        return None
    # Either may be given the other way: a growing cache's as a tensor once transformers 5.17 has cropped it by one, a
    # fixed one's as a number before its first token.
    if not getattr(cache, "is_compileable", False):
        return int(length)
    return length.clone() if isinstance(length, Tensor) else torch.tensor(length)


def capacity_of(cache: Any) -> int:
    """Positions that a cache of fixed size has."""
    return cache.get_max_length()
