"""Where one sequence ends in a row and the next one begins, wherever transformers' attention separates them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tracing import is_tracing
from . import arguments as names
from .call import ForwardCall, RunningForward
from .description import description_of
from .padding import is_visible, of_full_attention, own_keys


class Pairs(NamedTuple):
    """What a mask says of pairs of tokens.

    Attributes:
        starts: `(batch, time)`, true where a sequence begins, but for each row's first one.
        keeps_order: whether each token sees all valid tokens before it in its sequence, or those in a window, and
            none of another sequence: what a recurrence over time takes for granted. A tensor of one bool.
        sees_ahead: whether each token also sees all valid tokens behind it in its sequence, or those in a window.
    """

    starts: Tensor
    keeps_order: Tensor
    sees_ahead: Tensor


def starts_of(
    running: RunningForward, shape: tuple[int, int], module_name: str, part: str | None, *, both_ways: bool
) -> Tensor | None:
    """Where the sequences begin that lie in a row one after another.

    Args:
        running: the forward.
        shape: `(batch, time)` of the tokens as the adapted module sees them.
        module_name: name of the adapted module.
        part: name of the part of the model around it that is given masks and positions.
        both_ways: whether the recurrence runs over time in both directions.

    Returns:
        `(batch, time)`, bool, true where a sequence begins that isn't the first of its row; None if each row is one
        sequence.

    Raises:
        ValueError: if tokens are to be kept apart in a way that a recurrence can't follow, if the model goes across
            the sequences, if lengths aren't those of these tokens, or if sequences are packed behind a cache's tokens.
    """
    call = running.call
    has_past = not (isinstance(call.past, int) and call.past == 0)
    description = description_of(module_name, call.described)
    if description is not None:
        starts = described_starts(description.sequence_ids, shape, module_name)
        return None if starts is None else _without_past(starts, module_name, has_past=has_past)
    mask, given = call.mask_at(module_name), running.given(part)
    pairs = _pairs_of(mask, shape, call.past)
    if pairs is None:
        pairs = _torch_pairs(given, shape)
    if pairs is not None:
        return _checked(pairs, module_name, has_past=has_past, both_ways=both_ways)
    if mask is not None or call.tokens_shape is None or tuple(call.tokens_shape) != tuple(shape):
        return None
    if isinstance(call.sequence_lengths, Tensor):
        starts = _without_past(_starts_of_lengths(call.sequence_lengths, shape), module_name, has_past=has_past)
        if _uses_kernel(call) or call.attention is None or is_tracing() or not bool(starts.any()):
            return starts
        by_positions = _starts_of_positions(call, shape, given, module_name, both_ways=both_ways)
        if by_positions is None or not torch.equal(starts, by_positions):
            raise ValueError(_goes_across(module_name, "`cu_seq_lens_q`, the lengths of packed sequences,"))
        return starts
    return None if has_past else _starts_of_positions(call, shape, given, module_name, both_ways=both_ways)


def described_starts(sequence_ids: Tensor | None, shape: tuple[int, int], module_name: str) -> Tensor | None:
    """What `describe_tokens` says, checked.

    Raises:
        ValueError: if it is about tokens of another shape.
    """
    if sequence_ids is None:
        return None
    if tuple(sequence_ids.shape) != tuple(shape):
        raise ValueError(
            f"`describe_tokens` was given `sequence_ids` of shape {tuple(sequence_ids.shape)}, but {module_name} sees "
            f"tokens of (batch, time) = {tuple(shape)}. Describe the tokens as this module sees them, or name the "
            "part of the model that you mean by `module`."
        )
    return _from_second(sequence_ids.diff(dim=1) != 0)


def read_pairs(visible: Tensor) -> Pairs:
    """Read which tokens of a row belong to one sequence off which of them see each other.

    Args:
        visible: `(batch, time, time)`, bool, true where a token (second axis) sees another one (third axis). A token
            that doesn't see itself is padding.
    """
    time = visible.shape[1]
    index = torch.arange(time, device=visible.device)
    valid = visible.diagonal(dim1=1, dim2=2)
    # The valid token before each one, and whether it's seen: if not, a sequence begins.
    last = torch.where(valid, index, -1).cummax(1).values
    before = torch.cat([last.new_full((last.shape[0], 1), -1), last[:, :-1]], dim=1)
    sees_before = visible.gather(2, before.clamp(min=0)[..., None])[..., 0]
    starts = valid & (before >= 0) & ~sees_before
    # First and last index of each token's sequence, and counts of valid tokens up to each.
    first = torch.where(starts, index, 0).cummax(1).values
    end = torch.where(_from_second(starts[:, 1:]).roll(-1, 1), index, time - 1).flip(1).cummin(1).values.flip(1)
    count = torch.cat([last.new_zeros(last.shape[0], 1), valid.cumsum(1)], dim=1)

    seen = visible & valid[:, :, None]
    only_valid = ~(seen & ~valid[:, None, :]).any()
    earlier = seen.tril()
    oldest = torch.where(valid, earlier.to(torch.uint8).argmax(2), index)
    window = (index - oldest).amax() + 1
    since = torch.maximum(first, index - window + 1)
    sees_all = (earlier.sum(2) == count[:, 1:] - count.gather(1, since)) & (oldest >= since)
    later = seen.triu(1)
    newest = torch.where(later.any(2), time - 1 - later.flip(2).to(torch.uint8).argmax(2), index)
    keeps_order = only_valid & (sees_all | ~valid).all() & (newest <= end).all()
    ahead = (newest - index).amax()
    until = torch.minimum(end, index + ahead)
    sees_ahead = ((later.sum(2) == count.gather(1, until + 1) - count[:, 1:]) | ~valid).all()
    has_later = valid & (count.gather(1, end + 1) > count[:, 1:])
    sees_ahead &= (ahead > 0) | ~has_later.any()
    return Pairs(starts, keeps_order, sees_ahead)


def _pairs_of(mask: Any, shape: tuple[int, int], past: int | Tensor | None) -> Pairs | None:
    """Of the keys of each query, `(batch, heads, time, keys)`; None if this is no such mask for these tokens."""
    if isinstance(mask, dict) and "full_attention" in mask:
        mask = mask["full_attention"]  # layers that attend in chunks or windows separate no sequences
    mask = of_full_attention(mask)
    batch, time = shape
    if not isinstance(mask, Tensor) or mask.ndim != 4 or time == 1:
        return None
    if mask.shape[0] not in (1, batch) or mask.shape[2] != time or mask.shape[3] < time:
        return None
    own = own_keys(mask.shape[3], time, 0 if past is None else past, mask.device)[0]
    visible = is_visible(mask.index_select(3, own))
    pairs = read_pairs(visible[:, 0])
    alike = (visible == visible[:, :1]).all()
    return Pairs(pairs.starts.expand(batch, -1), pairs.keeps_order & alike, pairs.sees_ahead)


def _torch_pairs(given: dict[str, Any], shape: tuple[int, int]) -> Pairs | None:
    """What a layer of torch's own is told not to let meet, `(time, time)` or `(batch * heads, time, time)`."""
    if not any(name in given for name in names.PADDING_MASKS):
        return None  # not one of torch's
    batch, time = shape
    mask = next((given[name] for name in names.PAIR_MASKS if isinstance(given.get(name), Tensor)), None)
    if mask is None or time == 1 or mask.shape[-2:] != (time, time):
        return None
    visible = is_visible(mask) if mask.is_floating_point() else ~mask.bool()
    visible = visible.expand(1, 1, -1, -1) if mask.ndim == 2 else visible.unflatten(0, (batch, -1))
    pairs = read_pairs(visible[:, 0])
    alike = (visible == visible[:, :1]).all()
    return Pairs(pairs.starts.expand(batch, -1), pairs.keeps_order & alike, pairs.sees_ahead)


def _checked(pairs: Pairs, module_name: str, *, has_past: bool, both_ways: bool) -> Tensor | None:
    problem = (
        f"READ at {module_name} can't follow this attention mask: a recurrence over time needs tokens that see all "
        "valid tokens before them in their sequence (or those in a window), and none of other sequences. Masks that "
        "are causal, full, sliding, padded or block-diagonal are. Give such a mask, or cell='none' where tokens form "
        "a tree or share a prefix."
    )
    follows = pairs.keeps_order & pairs.sees_ahead if both_ways else pairs.keeps_order
    if is_tracing():
        torch._assert_async(follows if not has_past else follows & ~pairs.starts.any(), problem)
        return None if has_past else pairs.starts
    any_starts = bool(pairs.starts.any())
    if not bool(follows) or (any_starts and has_past):
        raise ValueError(problem)
    return pairs.starts if any_starts else None


def _starts_of_lengths(edges: Tensor, shape: tuple[int, int]) -> Tensor:
    batch, time = shape
    if not is_tracing() and int(edges[-1]) != batch * time:
        raise ValueError(
            f"READ was given packed sequences of {int(edges[-1])} tokens in a batch of {batch * time}: "
            "`cu_seq_lens_q` must cover all of them, padding included."
        )
    starts = torch.zeros(batch * time + 1, dtype=torch.bool, device=edges.device)
    starts = starts.index_fill(0, edges.long(), True)[:-1].view(batch, time)
    return _from_second(starts[:, 1:])


def _without_past(starts: Tensor, module_name: str, *, has_past: bool) -> Tensor:
    if has_past and not is_tracing() and bool(starts.any()):
        raise ValueError(
            f"READ at {module_name} was told that several sequences are packed in a row, and given a cache that holds "
            "earlier tokens, which only the first of them could go on from. Give packed sequences without a cache."
        )
    return starts


def _starts_of_positions(
    call: ForwardCall, shape: tuple[int, int], given: dict[str, Any], module_name: str, *, both_ways: bool
) -> Tensor | None:
    """Positions that begin again separate sequences where the model's attention does, as its blocks' masks show."""
    positions = call.position_ids
    if not isinstance(positions, Tensor) or positions.shape[-1] != shape[1]:
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # the text's own, before those of time, height and width
    if positions.ndim == 2:
        jumps, again = positions.diff(dim=1) != 1, positions.diff(dim=1) < 1
    elif positions.ndim == 3:  # each of the three rows may go back inside of one sequence, but not all to zero
        jumps = again = (positions[..., 1:] == 0).all(0) & (positions[..., :-1] != 0).any(0)
    else:
        return None
    if not call.causal and not _uses_kernel(call):
        return None  # attention in both directions goes across, whatever the positions are
    if not is_tracing() and not bool(jumps.any()):
        return None
    mask = given.get("attention_mask")
    pairs = _pairs_of(mask, shape, 0)
    if pairs is not None:
        return _checked(pairs, module_name, has_past=False, both_ways=both_ways)
    if _uses_kernel(call) and shape[0] == 1 and positions.ndim == 2:
        return _from_second(positions[:, 1:] == positions.min())
    if not given or (mask is not None and not isinstance(mask, Tensor)):  # flex attention's blocks
        return _from_second(jumps).expand(shape)
    if is_tracing() or not bool(again.any()):
        return None  # without a mask the attention goes across as well
    raise ValueError(_goes_across(module_name, "`position_ids` that begin again, as packed sequences have them,"))


def _uses_kernel(call: ForwardCall) -> bool:
    """Whether the attention is told of sequences by their lengths or positions, rather than by a mask."""
    return call.attention not in (None, "sdpa", "eager", "flex_attention")


def _goes_across(module_name: str, given: str) -> str:
    return (
        f"READ at {module_name} was given {given} but the model's attention goes across them. Let it separate them: "
        "pass `position_ids`, use_cache=False and no attention mask; positions of four rows, the text's first, to a "
        "Qwen-VL model; a block-diagonal mask of shape (batch, 1, time, time); or say where sequences begin with "
        "`peft_read.describe_tokens(sequence_ids=...)`."
    )


def _from_second(begins: Tensor) -> Tensor:
    """`begins (batch, time - 1)` of the second token on, as `(batch, time)`."""
    return torch.cat([begins.new_zeros(begins.shape[0], 1), begins], dim=1)
