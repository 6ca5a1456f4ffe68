"""One running forward: what it was given, as a record that nobody changes, and what its layers note while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.exceptions import MASKS_OF_TOWERS
from . import arguments as names
from .description import Description, check_reach, descriptions
from .states_beside_cache import cached_length


T = TypeVar("T")


@dataclass(frozen=True)
class ForwardCall:
    """What one forward was given that matters to a recurrence over its tokens.

    Attributes:
        is_plain: whether the model is a plain module, not one that follows transformers' rules.
        causal: whether the model's tokens see only earlier ones.
        attention: transformers' name of the attention implementation, None where a model has none.
        tokens_shape: `(batch, time)` of the tokens, None if the model was given none.
        mask: the model's own mask, in whatever form; None if it has none.
        masks_of_towers: patterns in the names of modules that see other tokens, and the mask for these.
        position_ids: the positions, if they were passed.
        sequence_lengths: where packed sequences start and end, if that was passed.
        cache: the cache that counts the model's own tokens, if one was passed.
        past: tokens in it before this call, a tensor if its size is fixed; None if it doesn't count them.
        makes_cache: whether the model may make a cache itself, and return it.
        is_paged: whether requests share the cache page by page (continuous batching).
        foreign_states: name of an argument that holds states of earlier tokens in another way, None if none does.
        videos: `(videos, frames)` of the pictures, where they were passed with an axis of frames.
        grids: frames, rows and columns of patches of packed images and videos, by name of the argument.
        unread_masks: names of a model of one's own for arguments that it calls masks, of which nothing is read.
        described: what `describe_tokens` says of this call, the innermost first.
    """

    is_plain: bool = False
    causal: bool = False
    attention: str | None = None
    tokens_shape: tuple[int, int] | None = None
    mask: Any = None
    masks_of_towers: tuple[tuple[str, Any], ...] = ()
    position_ids: Any = None
    sequence_lengths: Any = None
    cache: Any = None
    past: int | Tensor | None = 0
    makes_cache: bool = False
    is_paged: bool = False
    foreign_states: str | None = None
    videos: tuple[int, int] | None = None
    grids: dict[str, Tensor] = field(default_factory=dict)
    unread_masks: tuple[str, ...] = ()
    described: tuple[Description, ...] = ()

    @classmethod
    def of(cls, owner: nn.Module, arguments: dict[str, Any], *, causal: bool) -> ForwardCall:
        """Read the arguments of a forward, at its start: later its cache already holds its own tokens."""
        given = (arguments.get(name) for name in names.TOKENS)
        tokens = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
        cache = names.find_cache(arguments.values())
        config = getattr(owner, "config", None)
        towers = MASKS_OF_TOWERS.get(getattr(config, "model_type", ""), {})
        is_known = type(owner).__module__.partition(".")[0] == "transformers"
        check_reach(owner)
        use_cache = arguments.get("use_cache")
        return cls(
            is_plain=not isinstance(owner, PreTrainedModel),
            causal=causal,
            attention=getattr(config, "_attn_implementation", None),
            tokens_shape=None if tokens is None else (tokens.shape[0], tokens.shape[1]),
            mask=names.find_mask(arguments),
            masks_of_towers=tuple((where, arguments.get(name) if name else None) for where, name in towers.items()),
            position_ids=arguments.get(names.POSITIONS),
            sequence_lengths=arguments.get(names.SEQUENCE_LENGTHS),
            cache=cache,
            past=0 if cache is None else cached_length(cache),
            makes_cache=causal and bool(getattr(config, "use_cache", False) if use_cache is None else use_cache),
            is_paged=arguments.get(names.PAGES) is not None,
            foreign_states=names.find_foreign_states(arguments),
            videos=_videos(arguments),
            grids=names.find_grids(arguments),
            unread_masks=() if is_known else _unread_masks(arguments),
            described=descriptions(),
        )

    def mask_at(self, module_name: str) -> Any:
        """The model's mask for the tokens that a module sees."""
        towers = (mask for where, mask in self.masks_of_towers if re.search(where, module_name))
        return next(towers, self.mask) if self.masks_of_towers else self.mask


class SameObjects:
    """A key of which another one is only equal if it holds the very same objects; it keeps them, and so their ids."""

    def __init__(self, named: dict[str, Any]) -> None:
        self._named = named

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SameObjects) or self._named.keys() != other._named.keys():
            return False
        return all(value is other._named[name] for name, value in self._named.items())

    def __hash__(self) -> int:
        return hash(tuple(map(id, self._named.values())))


@dataclass
class RunningForward:
    """A forward while it runs: its `ForwardCall`, and what the layers of it share.

    Attributes:
        call: what it was given.
        backward: number of the backward pass in which it runs, -1 outside of one.
        parts: the masks that parts of the model were given, such as the encoder above the adapted blocks, by name of
            the part and of the argument.
        left: what the recurrences leave for the next call, by name; None where there is no next one.
        is_of: name of the part that was called, if the model itself wasn't.
    """

    call: ForwardCall
    backward: int = -1
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: dict[str, Any] | None = None
    is_of: str = ""
    _known: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, call: ForwardCall, is_of: str = "") -> RunningForward:
        """A forward that starts now. States are left beside a cache alone, so only where there may be one."""
        left: dict[str, Any] | None = {} if call.cache is not None or call.makes_cache else None
        return cls(call, backward_pass(), left=left, is_of=is_of)

    def so_far(self) -> RunningForward:
        """This forward as a checkpoint meets it; states that were left in the recomputation would keep memory."""
        return replace(self, parts=dict(self.parts), left=None)

    def again(self) -> RunningForward:
        """The same forward where a checkpoint runs a part of it."""
        return replace(self, backward=backward_pass())

    def given(self, part: str | None) -> dict[str, Any]:
        """The masks that a part of the model was given, and None by the name of those that it takes and wasn't."""
        return {} if part is None else self.parts.get(part, {})

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What `find` finds, for all layers of this forward: some answers take a look at values on the device."""
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]


def backward_pass() -> int:
    """Number of the backward pass that runs in this thread, -1 outside of one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _videos(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """The first two sizes of `pixel_values` and the like of shape `(videos, frames, channels, rows, columns)`."""
    for name, value in arguments.items():
        if name.startswith("pixel_values") and isinstance(value, Tensor) and value.ndim >= 5:
            return value.shape[0], value.shape[1]
    return None


def _unread_masks(arguments: dict[str, Any]) -> tuple[str, ...]:
    known = {*names.MASKS, *names.PADDING_MASKS, *names.MASKS_OF_OTHERS}
    given = ((n, value) for n, value in arguments.items() if "mask" in n and n not in known)
    return tuple(n for n, value in given if isinstance(value, Tensor) and not _is_of_pairs(n, value))


def _is_of_pairs(name: str, mask: Tensor) -> bool:
    return name in names.PAIR_MASKS and mask.ndim >= 2 and mask.shape[-1] == mask.shape[-2]
