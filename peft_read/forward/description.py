"""What a caller says of the tokens himself, where READ couldn't read it off the arguments of a forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Description(NamedTuple):
    """See `describe_tokens`."""

    valid: Tensor | None
    sequence_ids: Tensor | None
    module: str


class _Running(threading.local):
    def __init__(self) -> None:
        self.descriptions: tuple[Description, ...] = ()


_running = _Running()


@contextmanager
def describe_tokens(
    valid: Tensor | None = None, *, sequence_ids: Tensor | None = None, module: str = ""
) -> Iterator[None]:
    """Say which tokens are valid, and which belong to one sequence, for the forwards inside of this context.

    It takes the place of what READ reads off the arguments of a model, see `peft_read.forward`. Models of one's own
    need it where their masks have names that READ doesn't know:

        with describe_tokens(torch.cat([video_mask, text_mask], dim=1)):
            scores = model(video, video_mask, text, text_mask)

    Args:
        valid: `(batch, time)`, true or 1 where a token is valid, in the order in which the adapted modules see the
            tokens; all are by default.
        sequence_ids: `(batch, time)` integers, one for each sequence of those that are packed in a row: the recurrence
            begins anew wherever the number changes. Each row is one sequence by default.
        module: name of the part of the adapted model that this is about, as in `named_modules`; all of it by default.
            Contexts for several parts can be nested; the innermost one that is about a module counts for it.

    Raises:
        ValueError: if a tensor isn't of shape `(batch, time)`, or both are given and differ in shape; later, in the
            forward, if the adapted module sees tokens of another shape.

    Example:
        >>> import peft_read
        >>> from peft import get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> config = peft_read.ReadConfig(r=4, target_modules=["0"], init_weights=False)
        >>> model, x = get_peft_model(model, config), torch.randn(1, 5, 8)
        >>> with describe_tokens(torch.tensor([[0, 0, 1, 1, 1]])):
        ...     padded = model(x)
        >>> torch.allclose(padded[:, 2:], model(x[:, 2:]), atol=1e-6)
        True
    """
    for name, given in (("valid", valid), ("sequence_ids", sequence_ids)):
        if given is not None and given.ndim != 2:
            raise ValueError(f"`{name}` must be of shape (batch, time), got {tuple(given.shape)}.")
    if valid is not None and sequence_ids is not None and valid.shape != sequence_ids.shape:
        raise ValueError(
            f"`valid` and `sequence_ids` are about the same tokens, but have the shapes {tuple(valid.shape)} and "
            f"{tuple(sequence_ids.shape)}."
        )
    if sequence_ids is not None and (sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool):
        raise ValueError(f"`sequence_ids` must be integers, got {sequence_ids.dtype}.")
    before = _running.descriptions
    _running.descriptions = (Description(None if valid is None else valid != 0, sequence_ids, module), *before)
    try:
        yield
    finally:
        _running.descriptions = before


def descriptions() -> tuple[Description, ...]:
    """Those that run in this thread, the innermost first."""
    return _running.descriptions


def description_of(module_name: str, described: tuple[Description, ...]) -> Description | None:
    """The innermost description that is about a module, None if none is."""
    for description in described:
        if not description.module or f"{module_name}.".startswith(f"{description.module}."):
            return description
    return None
