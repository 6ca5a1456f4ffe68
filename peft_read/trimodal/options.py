"""Numbers that a processor is given beside media, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from torch import Tensor


T = TypeVar("T")
# Frames a second: from one in eleven days on, so that times stay numbers of single precision.
SLOWEST, FASTEST = 1e-6, 1e6
# Samples a second that sound may have, and FFmpeg resamples.
HIGHEST_RATE = 10_000_000


def frame_count(value: Any) -> int:
    """A number of frames, checked.

    Raises:
        ValueError: if it is no whole number of at least 1.
    """
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`num_frames` must be at least 1, a whole number, got {value!r}.")
    return int(value)


def sample_rate(value: Any) -> int:
    """Samples a second, checked.

    Raises:
        ValueError: if it is no whole number from 1 to `HIGHEST_RATE`.
    """
    value = _plain(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and 1 <= value <= HIGHEST_RATE and value == int(value)):
        raise ValueError(
            f"A `sampling_rate` must be a whole number of samples a second, as 16000, up to {HIGHEST_RATE:,}; got "
            f"{value!r}."
        )
    return int(value)


def frame_rate(value: Any) -> float:
    """Frames a second, checked.

    Raises:
        ValueError: if it is no number, or none that frames can have.
    """
    value = _plain(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and SLOWEST <= value <= FASTEST):
        raise ValueError(
            f"`fps` must be a number of frames a second from {SLOWEST:g} to {FASTEST:g}, as 25.0, or None where it "
            f"isn't known; got {value!r}."
        )
    return float(value)


def _plain(value: Any) -> Any:
    """A number of Python for one of NumPy or torch, as data sets hold in their formats."""
    return value.item() if isinstance(value, np.ndarray | np.generic | Tensor) and value.ndim == 0 else value


def of_each(value: Any, size: int, name: str, check: Callable[[Any], T]) -> list[T | None]:
    """A setting of each sample, checked; None for those without.

    Args:
        value: of all of them, or a list, array or tensor with that of each.
        size: how many samples.
        name: of the setting, for messages.
        check: what makes one of what was given.

    Raises:
        ValueError: if there are more or fewer, or one isn't right.
    """
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = [value] * size
    if len(value) != size:
        raise ValueError(f"`{name}` has {len(value)} values for {size} samples.")
    return [None if each is None else check(each) for each in value]
