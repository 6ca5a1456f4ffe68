"""Checks of single configuration fields: each names the field, what it got and what it expected."""

from __future__ import annotations

import math

from transformers.activations import ACT2FN


def check_positive_int(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is an integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_bool(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_activation(name: str, value: str) -> None:
    """Raise a ValueError unless `value` is a key of transformers' `ACT2FN` for a function without weights."""
    if value not in ACT2FN:
        raise ValueError(f"`{name}` must be one of {sorted(ACT2FN)}, got {value!r}.")
    if any(True for _ in ACT2FN[value].parameters()):
        raise ValueError(f"`{name}` must have no weights of its own; {value!r} has. Use 'gelu', say.")


def check_dropout(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a number from 0 to below 1, got {value!r}.")


def check_finite(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite number."""
    if not _is_number(value) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
