"""Recurrent states that live beside a KV cache and follow it wherever generation takes it.

A cache holds what attention must know of earlier tokens; READ's recurrence must know its state after the last of them.
Each layer's states are kept for every position, so that going back to an earlier token, when a draft is rejected, is
only an index. They are narrow: `r` numbers a token and layer.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


_ATTRIBUTE = "_read_states"
_BLOCK = 64  # steps by which a history that has become too short grows
# Where other models keep what they know of earlier tokens: Mamba, XLNet, Reformer, RWKV, XLM and streaming encoders.
_FOREIGN_CACHES = ("cache_params", "mems", "past_buckets_states", "state", "cache", "padding_cache")


class StateHistory:
    """The states of one recurrence over the tokens of a cache, `(batch, positions, width)`.

    Attributes:
        length: tokens of the cache whose states are known; of a cache of fixed size all that it has room for, or 0.
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
        return self._steps[:, position - 1] if position else torch.zeros_like(self._steps[:, 0])

    def write(self, position: int | Tensor, states: Tensor, cache: Any) -> None:
        """Put `states (batch, time, width)` at `position` and after, over what may be there.

        Args:
            position: as in `before`.
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
        earlier = None if self._steps is None or position == 0 else self._steps[:, :position]
        if states.requires_grad or (earlier is not None and earlier.requires_grad):
            self._steps = states if earlier is None else torch.cat([earlier, states], dim=1)
            return
        steps = self._steps
        fixed = steps is None or (steps.is_inference() and not torch.is_inference_mode_enabled())
        if steps is None or fixed or earlier is None or steps.shape[1] < self.length:
            steps = states.new_empty(states.shape[0], self.length + _BLOCK, states.shape[2])
            if earlier is not None:
                steps[:, :position] = earlier
        steps[:, position : self.length] = states
        self._steps = steps


class RecurrentStates:
    """All histories that belong to one cache, by the name of the recurrence."""

    def __init__(self) -> None:
        self.histories: dict[str, StateHistory] = {}

    @staticmethod
    def of(cache: Any) -> RecurrentStates | None:
        """Those of `cache`, None if it has none."""
        return cache.__dict__.get(_ATTRIBUTE)

    @classmethod
    def beside(cls, cache: Any) -> RecurrentStates:
        """Those of `cache`, made where it has none, and bound to what is done to it."""
        states = cls.of(cache)
        if states is None:
            states = cls()
            setattr(cache, _ATTRIBUTE, states)
            for name, method in _FOLLOWED.items():
                if hasattr(type(cache), name):
                    # On the instance: its class stays what it is, and a deep copy binds the method to itself.
                    setattr(cache, name, types.MethodType(method, cache))
        return states

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change the batch of all histories."""
        for history in self.histories.values():
            history.map_rows(function)


def _reorder_cache(self: Any, beam_idx: Tensor) -> None:
    type(self).reorder_cache(self, beam_idx)
    getattr(self, _ATTRIBUTE).map_rows(lambda steps: steps.index_select(0, beam_idx.to(steps.device)))


def _batch_repeat_interleave(self: Any, repeats: int) -> None:
    type(self).batch_repeat_interleave(self, repeats)
    getattr(self, _ATTRIBUTE).map_rows(lambda steps: steps.repeat_interleave(repeats, dim=0))


def _batch_select_indices(self: Any, indices: Tensor) -> None:
    type(self).batch_select_indices(self, indices)
    getattr(self, _ATTRIBUTE).map_rows(lambda steps: steps[indices.to(steps.device)])


def _crop(self: Any, *args: Any, **kwargs: Any) -> None:
    type(self).crop(self, *args, **kwargs)
    length = cached_length(self)
    for history in getattr(self, _ATTRIBUTE).histories.values():
        if isinstance(length, int):
            history.length = min(history.length, length)


def _reset(self: Any) -> None:
    type(self).reset(self)
    for history in getattr(self, _ATTRIBUTE).histories.values():
        history.length = 0


_FOLLOWED: dict[str, Callable[..., None]] = {
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "crop": _crop,
    "reset": _reset,
}


def self_attention_cache(cache: Any) -> Any:
    """The cache whose length counts a model's own tokens, None if there is none."""
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if hasattr(cache, "get_seq_length") else None


def foreign_cache(arguments: dict[str, Any]) -> str | None:
    """Name of an argument that holds what a model knows of earlier tokens, but not as a cache; None if none does."""
    given = [name for name in _FOREIGN_CACHES if not isinstance(arguments.get(name), (Tensor, types.NoneType))]
    cache = arguments.get("past_key_values")
    if cache is not None and self_attention_cache(cache) is None:
        given.append("past_key_values")
    return next(iter(given), None)


def cached_length(cache: Any) -> int | Tensor | None:
    """Tokens in a cache: a number, or a copy of a fixed-size cache's counter; None if it doesn't count them."""
    try:
        length = cache.get_seq_length()
    except ValueError:  # only layers of linear attention
        return None
    # Either may be given the other way: a growing cache's as a tensor once transformers 5.17 has cropped it by one, a
    # fixed one's as a number before its first token.
    if not getattr(cache, "is_compileable", False):
        return int(length)
    return length.clone() if isinstance(length, Tensor) else torch.tensor(length)


def capacity_of(cache: Any) -> int:
    """Positions that a cache of fixed size has."""
    get = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
    return get()
