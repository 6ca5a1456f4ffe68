"""The state that a recurrence starts from, and the state that it leaves, while tokens come piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .arguments import find_cache, outputs_of
from .call import ForwardCall, RunningForward
from .states_beside_cache import RecurrentStates, StateHistory, cached_length


@dataclass(frozen=True)
class LeftStates:
    """What one recurrence leaves.

    Attributes:
        compute: gives its states after every token, `(batch, time, width)`; not called where there is no cache.
        is_partial: whether they are of some rows only; the others hold NaN.
    """

    compute: Callable[[], Tensor]
    is_partial: bool


def state_before(call: ForwardCall, name: str, rows: Tensor | None) -> Tensor | None:
    """The state `(rows, width)` before a call's tokens, None if these are the first.

    Args:
        call: the call.
        name: which recurrence's.
        rows: of which rows of the batch; None for all.

    Raises:
        ValueError: if the cache holds tokens of which the recurrence has seen nothing, or earlier tokens are kept in
            another way than in a cache.
    """
    if call.is_paged:
        raise ValueError(
            "READ can't run under continuous batching, which mixes the tokens of many requests in one row: use "
            "`generate` with a padded batch."
        )
    if call.foreign_states is not None:
        raise ValueError(
            f"READ can't keep its states beside those that this model is given as `{call.foreign_states}`: set "
            "use_cache=False."
        )
    past = call.past
    if isinstance(past, int) and past == 0:
        return None
    known = RecurrentStates.of(call.cache)
    history = known.histories.get(name) if known is not None else None
    seen = 0 if history is None else history.length
    compiling = torch.compiler.is_compiling()
    if isinstance(past, Tensor) and seen == 0 and (compiling or not bool(past > 0)):
        return None
    # A cache of fixed size has its length on the device: its histories are told when they fall behind.
    if history is None or past is None or seen < (1 if isinstance(past, Tensor) else past):
        _refuse_cache(call, name, seen)
    start = history.before(past)
    if call.tokens_shape is not None and start.shape[0] != call.tokens_shape[0]:
        raise ValueError(
            f"READ ({name}) can't continue from this cache: its states are of {start.shape[0]} rows, the batch "
            f"has {call.tokens_shape[0]}. Change a cache by its own methods, such as `batch_repeat_interleave`, "
            "`batch_select_indices` and `reorder_cache`; the states beside it follow these alone."
        )
    if rows is not None:
        start = start[rows]
    if history.is_partial and not compiling and bool(start.isnan().any()):
        _refuse_cache(call, name, "some rows' tokens only")
    return start


def leave_states(running: RunningForward, output: Any, recurrences: set[str]) -> None:
    """Lay the states that a forward leaves beside the cache that it has filled, if there is one.

    Args:
        running: the forward, which has ended.
        output: what it gave.
        recurrences: names of those that have left states in some forward of the model; adds this one's.
    """
    call, left = running.call, running.left
    if left is None:
        return
    cache = call.cache if call.cache is not None else find_cache(outputs_of(output))
    if cache is None or call.past is None:
        return
    known = RecurrentStates.of(cache)
    if known is not None and isinstance(call.past, Tensor):
        for name, history in known.histories.items():
            if name in recurrences:
                history.length = 0  # until it is written below
    recurrences.update(left)
    length = cached_length(cache) if left and isinstance(call.past, int) else None
    for name, states in left.items():
        steps = states.compute()
        if length is not None and length != call.past + steps.shape[1]:
            return  # passed, but not filled
        history = RecurrentStates.beside(cache).histories.setdefault(name, StateHistory())
        history.write(call.past, steps, cache)
        history.is_partial |= states.is_partial


def _refuse_cache(call: ForwardCall, name: str, seen: int | str) -> NoReturn:
    held = "tokens that it doesn't count" if call.past is None else f"{int(call.past)} tokens"
    raise ValueError(
        f"READ ({name}) can't continue from this cache: it holds {held}, of which the recurrence has seen {seen}. "
        "Fill the cache with the same adapter active from its first token, or set use_cache=False."
    )
