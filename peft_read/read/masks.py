"""Which tokens are padding, read off whatever mask a model of transformers is given or makes for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


NAMES = ("attention_mask", "pixel_attention_mask", "patch_attention_mask")


def valid_tokens(mask: Any, shape: tuple[int, int], past: int | Tensor, *, additive: bool) -> Tensor | None:
    """Read a mask for the tokens of one call.

    Args:
        mask: `(batch, keys)`; or `(batch, heads, time, keys)`, the keys of each query, where a token is valid if it
            may look at itself; or a dict of such masks by kind of layer; bool, true where valid, or numbers.
        shape: `(batch, time)` of the tokens.
        past: tokens before them, which the mask may cover as well.
        additive: how to read a two-dimensional mask of floats: as numbers added to scores, where 0 is valid and
            negative is padding, else as 1 for valid and 0 for padding. Four-dimensional ones are always additive.

    Returns:
        `(batch, time)`, bool, true where a token is valid; None if this isn't a mask for these tokens.
    """
    if isinstance(mask, dict):
        kinds = [mask.get("full_attention"), *mask.values()]
        mask = next((kind for kind in kinds if isinstance(kind, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    batch, time = shape
    if mask.ndim == 3 and mask.shape[0] == batch and mask.shape[1] * mask.shape[2] == time:
        return mask.flatten(1) != 0  # patches of an image
    if mask.ndim == 4 and mask.shape[2] == 1 and time > 1:
        mask, additive = mask[:, 0, 0], True  # the same keys for all queries
    if mask.ndim == 2:
        if mask.shape[0] != batch or not _covers(mask.shape[1], time, past):
            return None
        mask = mask.gather(1, _own_keys(mask.shape[1], time, past, mask.device).expand(batch, -1))
        if additive and mask.is_floating_point():
            return mask >= 0
        if mask.is_floating_point() and not torch.compiler.is_compiling() and bool((mask < 0).any()):
            return None
        return mask != 0
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] != time or mask.shape[3] < time:
        return None
    own = mask[:, 0].gather(2, _own_keys(mask.shape[3], time, past, mask.device).expand(mask.shape[0], -1)[..., None])
    own = own[..., 0]
    valid = own >= 0 if own.is_floating_point() else own != 0
    return valid.expand(batch, -1)


def _covers(keys: int, time: int, past: int | Tensor) -> bool:
    return keys == time or (keys >= time if isinstance(past, Tensor) else keys == past + time)


def _own_keys(keys: int, time: int, past: int | Tensor, device: torch.device) -> Tensor:
    """Index `(1, time)` of each query among its keys: they end with the queries, but in a cache of fixed size."""
    last = keys - time
    # A cache of fixed size has room behind the queries until it, or its sliding window, is full.
    first = past.to(device).clamp(max=last) if isinstance(past, Tensor) else last
    return (torch.arange(time, device=device) + first)[None]
