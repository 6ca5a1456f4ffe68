"""LSTTA's two modules as functions of bottleneck tensors: which frames matter, and what the towers tell each other.

The structure (long-term semantic filtering, short-term semantic interaction) is the paper's: Liu, Xie, Gao and Yu, ACM
MM 2023, arXiv 2308.14274, abstract and Figure 1. Its equations weren't at hand: every formula here is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import layer_norm, linear, without_autocast
from .windows import Windows


# The score whose sigmoid is 0.9: at the start hardly any frame is suppressed.
UNSUPPRESSED = math.log(0.9 / 0.1)
# The least log importance that a gate gives: by itself nothing, beside others as faint a share that can be divided by.
FAINTEST = -30.0
# Periods over a clip of the slowest and of the fastest sinusoid that tells where in it a frame lies.
PERIODS = (0.5, 32.0)
# By how much heads that look by time prefer simultaneous tokens to others, in logits.
TIME_PREFERENCE = 12.0


@dataclass(frozen=True)
class Stream:
    """What one tower has for the others at one level: its tokens' queries, keys and values, in the last dimension.

    Attributes:
        timed: `(batch, steps, tokens, 3 * r)`, the tokens of each time step; None if the tower has no time axis.
        untimed: `(batch, tokens, 3 * r)`, tokens that belong to the whole clip, such as text and class tokens; None if
            there are none.
        untimed_mask: `(batch, tokens)` bool, which of these others may attend to; all where None.
        listens: whether the tower is told what the others find and tells them nothing, as a causal language model has
            to: by way of the others, its later tokens would reach its earlier ones.
    """

    timed: Tensor | None
    untimed: Tensor | None
    untimed_mask: Tensor | None = None
    listens: bool = False


@dataclass(frozen=True)
class Messages:
    """What a tower's tokens are told: `timed (batch, steps, tokens, r)` and `untimed (batch, tokens, r)`."""

    timed: Tensor | None
    untimed: Tensor | None


@dataclass(frozen=True)
class Keys:
    """Tokens to attend to.

    Attributes:
        keys: `(rows, tokens, r)`.
        values: `(rows, tokens, r)`.
        bias: `(rows, tokens)`, added to the logits: 0, minus infinity to hide a token.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


def attend(queries: Tensor, sources: Sequence[Keys], num_heads: int) -> Tensor:
    """Multi-head attention over all sources at once, and to a zero key with a zero value, which are always there.

    So a token to which nothing else is visible is told nothing, rather than something undefined.

    Args:
        queries: `(rows, tokens, r)`.
        sources: what to attend to.
        num_heads: heads, each `r / num_heads` wide.

    Returns:
        `(rows, tokens, r)`.
    """
    nothing = queries.new_zeros(len(queries), 1, queries.shape[-1])
    keys = torch.cat([nothing, *(source.keys for source in sources)], dim=1)
    values = torch.cat([nothing, *(source.values for source in sources)], dim=1)
    bias = torch.cat([nothing[..., 0], *(source.bias for source in sources)], dim=1)
    queries, keys, values = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    told = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias[:, None, None])
    return told.transpose(1, 2).flatten(2)


class FrameFilter(nn.Module):
    """Long-term semantic filtering: the importance of every frame, judged from the whole video, its sound and text.

    A frame's descriptor, the mean over its tokens' values, attends to those of all frames, then to the text and to
    what is heard at the time of each frame; frames and sound carry their position within the valid length. Two linear
    layers make a score of it. As a `"gate"`, a frame's importance is the sigmoid of its score, 0.9 or so before
    training. As a `"choice"`, frames are measured by each other: a frame's importance is the exponential of its score
    minus the highest score of its clip, so that a clip always has a frame that counts fully and pictures as such can't
    be switched off; all frames count fully before training. This is the only part of LSTTA whose cost grows with the
    square of the number of frames.

    Args:
        r: width of the bottleneck.
        num_heads: attention heads.
        form: `"gate"` or `"choice"`.
    """

    def __init__(self, r: int, num_heads: int, form: str = "gate") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.form = form
        # PEFT tells the modules of `modules_to_save` by their endings: these names end like no usual head.
        self.normalizer = nn.LayerNorm(r)
        self.projections = nn.Linear(r, 3 * r)
        self.context_query = nn.Linear(r, r)
        self.enlarger = nn.Linear(r, r)
        self.scorer = nn.Linear(r, 1)
        nn.init.constant_(self.scorer.bias, UNSUPPRESSED)
        if form == "choice":
            nn.init.zeros_(self.scorer.weight)

    def forward(self, streams: Mapping[str, Stream], windows: Windows) -> Tensor:
        """Log importance of the frames, `(batch, frames)`: at most 0, minus infinity for masked ones."""
        frames, steps = streams["vision"].timed, windows.steps["vision"]
        assert frames is not None
        descriptors = frames.chunk(3, dim=-1)[2].mean(2)
        position = _position_code(steps.position, descriptors)
        x = layer_norm(descriptors, self.normalizer) + position
        queries, keys, values = linear(x, self.projections).chunk(3, dim=-1)
        x = x + attend(queries, [Keys(keys, values, _bias(steps.valid, x))], self.num_heads)
        others = [tower for tower, stream in streams.items() if tower != "vision" and not stream.listens]
        context = [keys for tower in others for keys in _context(tower, streams, windows)]
        x = x + attend(linear(x, self.context_query), context, self.num_heads)
        score = linear(F.gelu(linear(x, self.enlarger)), self.scorer).squeeze(-1)
        if self.form == "gate":
            # Where gates close on all frames of a clip, shares of their sum must still have finite gradients.
            return F.logsigmoid(score).clamp(min=FAINTEST).masked_fill(~steps.valid, -math.inf)
        score = score.masked_fill(~steps.valid, -math.inf)
        highest = score.amax(1, keepdim=True)
        return score - highest.masked_fill(highest == -math.inf, 0.0)


def interact(
    streams: Mapping[str, Stream],
    windows: Windows,
    *,
    num_heads: int,
    frame_filter: FrameFilter | None = None,
) -> tuple[dict[str, Messages], Tensor | None]:
    """Everything that happens between the towers at one level, without autocast.

    Args:
        streams: by tower; `"vision"` and `"audio"` may have a time axis.
        windows: the windows of each clip.
        num_heads: attention heads.
        frame_filter: judges the frames; None to let all count alike.

    Returns:
        The messages by tower, and the importance `(batch, frames)` of the frames, 0 for masked ones; None without
        frames or filter.
    """
    some = next(x for stream in streams.values() for x in (stream.timed, stream.untimed) if x is not None)
    with without_autocast(some.device):
        log_importance = None
        if frame_filter is not None and "vision" in streams and streams["vision"].timed is not None:
            log_importance = frame_filter(streams, windows)
        messages = short_term_interaction(streams, windows, num_heads=num_heads, log_importance=log_importance)
        return messages, None if log_importance is None else log_importance.exp()


def short_term_interaction(
    streams: Mapping[str, Stream],
    windows: Windows,
    *,
    num_heads: int,
    log_importance: Tensor | None = None,
) -> dict[str, Messages]:
    """Within every window, tokens attend to those of the other towers; all windows at once.

    Queries and keys of timed tokens carry a time code, the same for all towers: an image tower doesn't know which
    frame it sees. Half of the heads look by time, sharply; the others, without the code, at the window as a whole, or
    else text, which has no time, would hardly be seen. That holds in windows of one frame as well, where a frame's few
    tokens of sound would be lost among words. Untimed tokens take part in every window, and are told the mean
    over the windows, weighted by importance. A frame's log importance is added to the logits of its tokens as keys,
    and its importance scales what its tokens are told: as it goes to 0, the frame goes away, as if it were masked.

    Args:
        streams: by tower.
        windows: the windows of each clip.
        num_heads: attention heads.
        log_importance: `(batch, frames)`, of the frames of `"vision"`; all 0 where None.

    Returns:
        The messages by tower, zero for masked time steps.
    """
    importance = None if log_importance is None else log_importance.exp()
    tokens = {
        tower: _in_windows(tower, stream, windows, num_heads, log_importance) for tower, stream in streams.items()
    }
    weights = windows.weights(importance)
    messages = {}
    for tower, stream in streams.items():
        heard = [keys for other, (_, keys) in tokens.items() if other != tower and not streams[other].listens]
        told = attend(tokens[tower][0], heard, num_heads)
        told = told.unflatten(0, (-1, windows.count))
        timed = untimed = None
        if stream.untimed is not None:
            untimed = told[:, :, told.shape[2] - stream.untimed.shape[1] :]
            untimed = untimed[:, 0] if weights is None else (untimed * weights[..., None, None]).sum(1)
        if stream.timed is not None:
            steps, per_step = windows.steps[tower], stream.timed.shape[2]
            places = steps.take.shape[2]
            timed = steps.join(told[:, :, : places * per_step].unflatten(2, (places, per_step)))
            if tower == "vision" and importance is not None:
                timed = timed * importance[..., None, None]
        messages[tower] = Messages(timed, untimed)
    return messages


def _in_windows(
    tower: str, stream: Stream, windows: Windows, num_heads: int, log_importance: Tensor | None
) -> tuple[Tensor, Keys]:
    """A tower's tokens in every window, timed ones first: queries `(batch * windows, tokens, r)`, keys and values."""
    parts, biases = [], []
    if stream.timed is not None:
        steps, per_step = windows.steps[tower], stream.timed.shape[2]
        width = stream.timed.shape[-1] // 3
        code = _time_code(steps.time, stream.timed, windows.window, width // num_heads)
        by_time = max(1, num_heads // 2)
        code = F.pad(code.repeat(1, 1, by_time), (0, width - by_time * code.shape[-1]))
        coded = stream.timed + F.pad(code.repeat(1, 1, 2), (0, width)).unsqueeze(2)  # queries and keys, not values
        parts.append(steps.split(coded).flatten(2, 3))
        bias = _bias(steps.filled, stream.timed)
        if tower == "vision" and log_importance is not None:
            bias = torch.where(steps.filled, steps.split(log_importance), bias)
        biases.append(bias.repeat_interleave(per_step, dim=2))
    if stream.untimed is not None:
        batch, count = stream.untimed.shape[:2]
        parts.append(stream.untimed.unsqueeze(1).expand(-1, windows.count, -1, -1))
        valid = stream.untimed_mask
        bias = stream.untimed.new_zeros(batch, count) if valid is None else _bias(valid, stream.untimed)
        biases.append(bias.unsqueeze(1).expand(-1, windows.count, -1))
    queries, keys, values = torch.cat(parts, dim=2).flatten(0, 1).chunk(3, dim=-1)
    return queries, Keys(keys, values, torch.cat(biases, dim=2).flatten(0, 1))


def _context(tower: str, streams: Mapping[str, Stream], windows: Windows) -> list[Keys]:
    """What frames may look at in a tower: its time steps, joined to one a frame, and its untimed tokens."""
    stream, context = streams[tower], []
    if stream.timed is not None:
        steps = windows.steps[tower]
        described = torch.cat([stream.timed.mean(2), steps.position.to(stream.timed.dtype).unsqueeze(-1)], dim=-1)
        joined, heard = steps.at_frames(described, windows.window)
        _, keys, values = joined[..., :-1].chunk(3, dim=-1)
        context.append(Keys(keys + _position_code(joined[..., -1], keys), values, _bias(heard, keys)))
    if stream.untimed is not None:
        _, keys, values = stream.untimed.chunk(3, dim=-1)
        valid = stream.untimed_mask
        bias = keys.new_zeros(keys.shape[:2]) if valid is None else _bias(valid, keys)
        context.append(Keys(keys, values, bias))
    return context


def _bias(visible: Tensor, like: Tensor) -> Tensor:
    """0 where true, minus infinity where false."""
    return like.new_zeros(visible.shape).masked_fill(~visible, -math.inf)


def _position_code(position: Tensor, like: Tensor) -> Tensor:
    """Sines and cosines of places `(batch, steps)` within a clip, between 0 and 1: `(batch, steps, r)`."""
    slow, fast = (2 * math.pi * periods for periods in PERIODS)
    return _sinusoids(position, like, slow, fast, like.shape[-1])


def _time_code(time: Tensor, like: Tensor, window: int, size: int) -> Tensor:
    """Sines and cosines of times `(batch, steps)` within a window, in frames: `(batch, steps, size)`.

    From half a period in a window to half a period in a frame.
    """
    strength = math.sqrt(2 * TIME_PREFERENCE / math.sqrt(size))  # attention divides by the root of the size
    return strength * _sinusoids(time, like, math.pi / window, math.pi, size)


def _sinusoids(x: Tensor, like: Tensor, slow: float, fast: float, size: int) -> Tensor:
    """Sines and cosines of `x (...)`, `(..., size)`, at angular frequencies from `slow` to `fast`."""
    exponents = torch.linspace(math.log(slow), math.log(fast), size // 2, device=like.device, dtype=like.dtype)
    angles = x.to(like.dtype).unsqueeze(-1) * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
