"""Which tokens are padding, read off whatever mask a model is given or makes for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tracing import is_tracing
from . import arguments as names
from .call import RunningForward
from .description import description_of


# A number added to attention's scores that hides a key. Models hide by -10000 and less, some biases reach -100.
_HIDES = -1e3


def padding_of(running: RunningForward, shape: tuple[int, int], module_name: str, part: str | None) -> Tensor | None:
    """Which of the tokens of a running forward are valid.

    Args:
        running: the forward.
        shape: `(batch, time)` of the tokens as the adapted module sees them.
        module_name: name of the adapted module.
        part: name of the part of the model whose mask counts where the model's own doesn't fit.

    Returns:
        `(batch, time)`, bool, true where a token is valid; None if all are.

    Raises:
        ValueError: if there is a mask that isn't for these tokens.
    """
    description = description_of(module_name, running.call.described)
    if description is not None:
        return described_padding(description.valid, shape, module_name)
    valid = _read_masks(running, shape, module_name, part)
    # One look at the values; models of transformers take one of their own.
    return None if valid is None or (not is_tracing() and bool(valid.all())) else valid


def described_padding(valid: Tensor | None, shape: tuple[int, int], module_name: str) -> Tensor | None:
    """What `describe_tokens` says, checked.

    Raises:
        ValueError: if it is about tokens of another shape.
    """
    if valid is not None and tuple(valid.shape) != tuple(shape):
        raise ValueError(
            f"`describe_tokens` was given `valid` of shape {tuple(valid.shape)}, but {module_name} sees tokens of "
            f"(batch, time) = {tuple(shape)}. Describe the tokens as this module sees them, or name the part of the "
            "model that you mean by `module`."
        )
    return valid


def _read_masks(running: RunningForward, shape: tuple[int, int], module_name: str, part: str | None) -> Tensor | None:
    call, given = running.call, running.given(part)
    mask = call.mask_at(module_name)
    inner = names.find_mask(given)
    padding = next((given[name] for name in names.PADDING_MASKS if isinstance(given.get(name), Tensor)), None)
    if mask is None and inner is None and padding is None:
        return None
    past = 0 if call.past is None else call.past
    valid = valid_tokens(mask, shape, past, additive=False)
    if valid is None:
        valid = valid_tokens(inner, shape, past, additive=True)
    if valid is None and padding is not None and tuple(padding.shape) == tuple(shape):
        valid = is_visible(padding) if padding.is_floating_point() else padding == 0
    # Nothing is padded, whatever tokens the mask is about; or it isn't about these.
    if valid is None and padding is None and (mask is None or _is_all_true(mask)):
        return None
    if valid is None and padding is None and inner is None and call.is_plain and takes_a_mask(running, part):
        return None
    if valid is None:
        mask = padding if mask is None else mask
        form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            f"READ can't tell which tokens are padding: the model was given an attention mask of {form}, and the "
            f"adapted module's output has (batch, time) = {tuple(shape)}. Pass a mask of shape (batch, time), 1 where "
            "a token is valid; leave it out if nothing is padded; target modules that see the tokens it is about; or "
            "say which tokens are valid with `peft_read.describe_tokens`."
        )
    return valid


def takes_a_mask(running: RunningForward, part: str | None) -> bool:
    """Whether a part of the model is one that is told which tokens are padding; if it wasn't, none is."""
    given = running.given(part)
    return any(name in given for name in (*names.MASKS, *names.PADDING_MASKS))


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
    mask = of_full_attention(mask)
    if not isinstance(mask, Tensor):
        return None
    batch, time = shape
    if mask.ndim == 3 and mask.shape[0] == batch and mask.shape[1] * mask.shape[2] == time:
        return mask.flatten(1) != 0  # patches of an image
    if mask.ndim == 4 and mask.shape[2] == 1 and time > 1 and mask.shape[0] in (1, batch):
        mask, additive = mask[:, 0, 0].expand(batch, -1), True  # the same keys for all queries
    if mask.ndim == 2:
        if mask.shape[0] != batch or not _covers(mask.shape[1], time, past):
            return None
        mask = mask.gather(1, own_keys(mask.shape[1], time, past, mask.device).expand(batch, -1))
        if additive and mask.is_floating_point():
            return is_visible(mask)
        # One that is zero throughout, or negative somewhere, looks as if it were to be added.
        if mask.is_floating_point() and not is_tracing() and not bool((mask >= 0).all() & (mask > 0).any()):
            return None
        return mask != 0
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] != time or mask.shape[3] < time:
        return None
    own = mask[:, 0].gather(2, own_keys(mask.shape[3], time, past, mask.device).expand(mask.shape[0], -1)[..., None])
    return is_visible(own[..., 0]).expand(batch, -1)


def is_visible(mask: Tensor) -> Tensor:
    """Where a mask shows a key to a query: a number added to attention's scores may be a bias, unless it's large."""
    return mask > _HIDES if mask.is_floating_point() else mask != 0


def of_full_attention(mask: Any) -> Any:
    """Of a dict of masks by kind of layer that of full attention, else any that is there; another mask itself."""
    if not isinstance(mask, dict):
        return mask
    kinds = [mask.get("full_attention"), *mask.values()]
    return next((kind for kind in kinds if isinstance(kind, Tensor)), None)


def _covers(keys: int, time: int, past: int | Tensor) -> bool:
    return keys == time or (keys >= time if isinstance(past, Tensor) else keys == past + time)


def own_keys(keys: int, time: int, past: int | Tensor, device: torch.device) -> Tensor:
    """Index `(1, time)` of each query among its keys: they end with the queries, but in a cache of fixed size."""
    last = keys - time
    # A cache of fixed size has room behind the queries until it, or its sliding window, is full.
    first = past.to(device).clamp(max=last) if isinstance(past, Tensor) else last
    return (torch.arange(time, device=device) + first)[None]


def _is_all_true(mask: Any) -> bool:
    is_plain = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point()
    return is_plain and not is_tracing() and bool(mask.all())
