"""What a caller says of the tokens himself, where READ couldn't read it off the arguments of a forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..tracing import is_tracing


@dataclass(eq=False)
class Description:
    """See `describe_tokens`.

    Attributes:
        met: names of adapted modules that have looked for what is said of them.
        is_used: whether one of them was meant.
    """

    valid: Tensor | None
    sequence_ids: Tensor | None
    module: str
    met: list[str] = field(default_factory=list)
    is_used: bool = False


class _Running(threading.local):
    def __init__(self) -> None:
        self.descriptions: tuple[Description, ...] = ()


_running = _Running()
_in_any_thread = 0


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
        module: name of the part of the adapted model that this is about, as in its `named_modules`, with PEFT's
            `base_model.model.` before it or without; all of it by default. Contexts for several parts can be nested;
            the innermost one that is about a module counts for it.

    It counts in its own thread. Where a checkpoint of one's own runs whole calls of the model again, the context
    belongs inside of what is checkpointed.

    Raises:
        ValueError: if a tensor isn't of shape `(batch, time)`, or both are given and differ in shape; later, in the
            forward, if the adapted module sees tokens of another shape; at the end, if adapted modules ran, but none
            in `module`.

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
    global _in_any_thread
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
    name = f"{module}.".removeprefix("base_model.model.").rstrip(".")
    description = Description(None if valid is None else valid != 0, sequence_ids, name)
    before = _running.descriptions
    _running.descriptions = (description, *before)
    _in_any_thread += 1
    try:
        yield
    finally:
        _running.descriptions = before
        _in_any_thread -= 1
    if description.met and not description.is_used:
        raise ValueError(
            f"`describe_tokens(module={module!r})` was about none of the adapted modules that ran, such as "
            f"{', '.join(description.met)}. Name a part of the adapted model that holds some, as in its "
            "`named_modules`."
        )


def descriptions() -> tuple[Description, ...]:
    """Those that run in this thread, the innermost first."""
    return _running.descriptions


def description_of(module_name: str, described: tuple[Description, ...]) -> Description | None:
    """The innermost description that is about a module, None if none is."""
    for description in described:
        if not description.module or f"{module_name}.".startswith(f"{description.module}."):
            if not is_tracing():
                description.is_used = True
            return description
        if not is_tracing() and len(description.met) < 3 and module_name not in description.met:
            description.met.append(module_name)
    return None


def check_reach(owner: nn.Module) -> None:
    """Refuse a replica of `nn.DataParallel`, which runs in a thread of its own, while another thread describes tokens.

    Raises:
        RuntimeError: if the description can't reach it.
    """
    if _in_any_thread and not _running.descriptions and getattr(owner, "_is_replica", False):
        raise RuntimeError(
            "`describe_tokens` doesn't reach the replicas of nn.DataParallel, which see a part of the batch each. Use "
            "one process for each device, as `accelerate launch` starts them."
        )
