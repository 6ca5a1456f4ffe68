"""What one running forward was given that matters to a recurrence over its tokens, and what it leaves for the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .decoding import RecurrentStates, StateHistory, cached_length, foreign_cache, self_attention_cache
from .masks import NAMES, valid_tokens


# By `model_type`: what these are given is the mask of one of their towers, while their own blocks see other tokens
# (X-CLIP's the frames of a video).
_MASK_OF_A_TOWER = ("xclip",)


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
    _segments: Any = ()  # until somebody asks

    @classmethod
    def of(cls, owner: nn.Module, arguments: dict[str, Any], **known: Any) -> ForwardCall:
        """Read the arguments of a forward, at its start: later its cache already holds its own tokens."""
        given = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        tokens = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
        cache = self_attention_cache(arguments.get("past_key_values"))
        config = getattr(owner, "config", None)
        return cls(
            **known,
            tokens_shape=None if tokens is None else (tokens.shape[0], tokens.shape[1]),
            mask=None if getattr(config, "model_type", None) in _MASK_OF_A_TOWER else _mask_in(arguments),
            pads_right=hasattr(config, "attention_window"),
            cache=cache,
            past=0 if cache is None else cached_length(cache),
            is_paged=arguments.get("write_index") is not None,
            foreign_cache=foreign_cache(arguments),
            position_ids=arguments.get("position_ids"),
            cu_seq_lens=arguments.get("cu_seq_lens_q"),
            backward=backward_pass(),
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
        if valid is None and (self.mask is None or _is_all_true(self.mask)):
            return None  # nothing is padded, whatever tokens this is about
        if valid is None:
            mask = self.mask
            form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(
                f"READ can't tell which tokens are padding: the model was given an attention mask of {form}, and the "
                f"adapted module's output has (batch, time) = {shape}. Pass a mask of shape (batch, time), 1 where a "
                "token is valid; leave it out if nothing is padded; or target modules that see the tokens it is about."
            )
        # One look at the values for all layers of this call; models of transformers take one of their own.
        return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid

    def segments(self) -> list[int] | None:
        """Lengths of the sequences that lie in the rows one after another, None if each row is one sequence."""
        if self._segments == ():
            self._segments = self._find_segments()
        return self._segments

    def _find_segments(self) -> list[int] | None:
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
            for name, history in known.histories.items():
                if name in self.recurrences:
                    history.length = 0  # until it is written below
        states = {name: compute() for name, compute in self.states.items()}
        self.recurrences.update(states)
        if not states:
            return
        time = next(iter(states.values())).shape[1]
        if isinstance(self.past, int) and cached_length(cache) != self.past + time:
            return  # passed, but not filled
        histories = RecurrentStates.beside(cache).histories
        for name, steps in states.items():
            history = histories.setdefault(name, StateHistory())
            history.write(self.past, steps, cache)
            history.is_partial |= name in self.partial


def _is_all_true(mask: Any) -> bool:
    is_plain = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point()
    return is_plain and not torch.compiler.is_compiling() and bool(mask.all())


def _mask_in(arguments: dict[str, Any]) -> Any:
    """The mask that a model was given; a dict of no masks is what generation passes where nothing is padded."""
    for name in NAMES:
        mask = arguments.get(name)
        if mask is not None and not (isinstance(mask, dict) and all(kind is None for kind in mask.values())):
            return mask
    return None


def backward_pass() -> int:
    """Number of the backward pass that runs in this thread, -1 outside of one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _cache_in(output: Any) -> Any:
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, (tuple, list)):
        cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return cache
