"""Checks of single configuration fields: each names the field, what it got and what it expected."""

from __future__ import annotations

import math
import re
from typing import Any

from transformers.activations import ACT2FN


# Beyond any use, and small enough that nothing which is made of such a number fills the memory of a machine.
GREATEST_INT = 2**20
GREATEST_SCALE = 1e6
MOST_NAMES = 2_000
LONGEST_PATTERN = 10_000


def shown(value: object) -> str:
    """A value for a message, at most 80 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list that holds itself
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_positive_int(name: str, value: object, greatest: int = GREATEST_INT) -> None:
    """Raise a ValueError unless `value` is an integer from 1 to `greatest`."""
    if not _is_int(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a positive integer, got {shown(value)}.")
    if value > greatest:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be at most {greatest}, got {shown(value)}.")


def check_width(module: str, name: str, value: int, width: int) -> None:
    """Raise a ValueError if a bottleneck is wider than 1024 and than the `width` of the module that it sits at."""
    if value > max(width, 1024):
        raise ValueError(
            f"`{name}={shown(value)}` is wider than the {width} features of {module}, so that it is no bottleneck. "
            f"Choose at most {max(width, 1024)}."
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")


def check_bool(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_activation(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a key of transformers' `ACT2FN` for a function without weights."""
    if not isinstance(value, str) or value not in ACT2FN:
        raise ValueError(f"`{name}` must be one of {sorted(ACT2FN)}, got {shown(value)}.")
    if any(True for _ in ACT2FN[value].parameters()):
        raise ValueError(f"`{name}` must have no weights of its own; {value!r} has. Use 'gelu', say.")


def check_dropout(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a number from 0 to below 1, got {shown(value)}.")


def check_scale(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite number that float32 can be multiplied by."""
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"`{name}` must be a finite number, got {shown(value)}.")
    if abs(value) > GREATEST_SCALE:  # type: ignore[arg-type]
        raise ValueError(f"`{name}` must be from -{GREATEST_SCALE:g} to {GREATEST_SCALE:g}, got {shown(value)}.")


def check_names(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a list or set of names, at least one and at most `MOST_NAMES`."""
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise ValueError(f"`{name}` must be a list of names, got {shown(value)}.")
    if len(value) > MOST_NAMES:
        raise ValueError(
            f"`{name}` must have at most {MOST_NAMES:,} names, got {len(value):,}. Name the modules by their endings, "
            "or by a regular expression."
        )
    for each in value:
        if not isinstance(each, str) or not each:
            raise ValueError(f"`{name}` must be a list of names, got {shown(each)} in it.")


def check_pattern(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a regular expression that can be compiled."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` must be a regular expression, got {shown(value)}.")
    if len(value) > LONGEST_PATTERN:
        raise ValueError(f"`{name}` must have at most {LONGEST_PATTERN:,} characters, got {len(value):,}.")
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{name}` isn't a regular expression: {error}; got {shown(value)}.") from None


def check_indices(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is the index of a block, or a list of such."""
    indices: list[Any] = list(value) if isinstance(value, (list, tuple, set)) else [value]
    for each in indices:
        if not _is_int(each) or each < 0:
            raise ValueError(f"`{name}` must be the index of a block, or a list of indices, got {shown(value)}.")
        if each > GREATEST_INT:
            raise ValueError(f"`{name}` must hold indices of at most {GREATEST_INT}, got {shown(each)}.")


def check_adapter_name(name: str) -> None:
    """Raise a ValueError if an adapter can't be saved in a folder of its name."""
    if not isinstance(name, str) or not name or re.search(r"[/\\.\x00-\x1f]|^[A-Za-z]:", name):
        raise ValueError(
            f"An adapter can't be named {shown(name)}: it is saved in a folder of that name, and torch names its "
            "weights by it. Choose a name without slashes, dots and control characters."
        )


def check_inner_adapters(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a dict of lists of names of adapters, by names of modules."""
    if not isinstance(value, dict) or not all(isinstance(names, list) for names in value.values()):
        raise ValueError(f"`{name}` must be a dict of lists of adapters by part of the model, got {shown(value)}.")
    for part, names in value.items():
        if not isinstance(part, str) or not is_name_of_module(part):
            raise ValueError(f"`{name}` must go by names of modules, got {shown(part)}.")
        for each in names:
            check_adapter_name(each)


def is_name_of_module(name: str) -> bool:
    """Whether a name consists of letters, digits, underscores, dots and hyphens, as those of modules do."""
    return re.fullmatch(r"[\w.-]+", name) is not None


def check_token_indices(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a list of token indices, or lists of such by names of modules."""
    for key, indices in value.items() if isinstance(value, dict) else [("", value)]:
        where = f"{name}[{key!r}]" if key else name
        if not isinstance(indices, (list, tuple)) or not indices:
            raise ValueError(f"`{where}` must be a list of token indices, got {shown(indices)}.")
        for each in indices:
            if not _is_int(each) or not 0 <= each < 2**31:
                raise ValueError(f"`{where}` must be a list of token indices, got {shown(each)} in it.")
        if len(set(indices)) < len(indices):
            raise ValueError(f"`{where}` names a token twice.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
