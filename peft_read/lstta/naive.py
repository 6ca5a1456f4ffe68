"""The exchange within windows as it is defined, token by token: what `interaction.py` must equal. Read it first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """A token of one clip.

    Attributes:
        query: `(r,)`, and so are key and value.
        key: what others find it by.
        value: what it tells.
        window: of its time step; None if it belongs to the whole clip, and so to every window.
        time: since the window began, in frames.
        importance: of its frame, from 0 to 1.
        visible: whether others may attend to it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None = None
    time: float = 0.0
    importance: float = 1.0
    visible: bool = True


def naive_exchange(
    towers: Mapping[str, Sequence[Token]],
    weights: Sequence[float],
    *,
    frames: int,
    num_heads: int,
    time_preference: float,
) -> dict[str, list[Tensor]]:
    """What every token of one clip is told by the tokens of the other towers in its window.

    In head h, with size d, the token with query q hears sum_j softmax_j(q . k_j / sqrt(d) + log g_j) v_j, times its
    own importance g, where j runs over the others' visible tokens in the window and over one of zeros. In the first
    half of the heads, q and k of tokens with a time t carry its code, sines and cosines of t times frequencies that
    rise geometrically from pi / `frames` to pi, times a strength s: for equal times it adds `time_preference` to the
    logit. A token of the whole clip hears the mean over the windows by their weights. The structure is LSTTA's (arXiv
    2308.14274, Figure 1), the formulas are ours.

    Args:
        towers: the tokens of each tower.
        weights: of the windows, of sum 1.
        frames: in a window.
        num_heads: heads, each of size r / num_heads.
        time_preference: see above.

    Returns:
        A message `(r,)` for each token.
    """

    def carry(x: Tensor, token: Token) -> Tensor:
        size = len(x) // num_heads
        of_head = max(1, num_heads // 2) * [_code(token.time, frames, size, time_preference)]
        code = torch.cat(of_head)
        return x if token.window is None else x + torch.cat([code, code.new_zeros(len(x) - len(code))])

    def hear(token: Token, window: int, others: Sequence[Token]) -> Tensor:
        heard = [t for t in others if t.visible and t.window in (None, window)]
        keys = torch.stack([torch.zeros_like(token.key), *(carry(t.key, t) for t in heard)]).chunk(num_heads, 1)
        values = torch.stack([torch.zeros_like(token.value), *(t.value for t in heard)]).chunk(num_heads, 1)
        bias = torch.tensor([1.0, *(t.importance for t in heard)]).log()
        queries = carry(token.query, token).chunk(num_heads)
        told = [
            ((k @ q) / math.sqrt(len(q)) + bias).softmax(0).to(v.dtype) @ v
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return token.importance * torch.cat(told)

    messages = {}
    for tower, tokens in towers.items():
        others = [token for other, its in towers.items() if other != tower for token in its]
        messages[tower] = [
            hear(token, token.window, others)
            if token.window is not None
            else torch.stack([weight * hear(token, w, others) for w, weight in enumerate(weights)]).sum(0)
            for token in tokens
        ]
    return messages


def _code(time: float, frames: int, size: int, time_preference: float) -> Tensor:
    """Of one head, `(size,)`."""
    pairs = size // 2
    strength = math.sqrt(time_preference * math.sqrt(size) / pairs)
    steps = [i / (pairs - 1) if pairs > 1 else 0.0 for i in range(pairs)]
    angles = [time * math.pi / frames * frames**step for step in steps]
    return strength * torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
