"""Whether a card can hold what it is told: asked when it is told, not after a night's training."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub import EvalResult

from .page import RECORD, open_fence


LONGEST = 500_000  # characters
# What stands on a card by other ways, and by which.
OTHER_WAYS = {"model-index": "results", "model_index": "results", "eval_results": "results", "widget_data": "widget"}
TEXTS = ("license", "license_name", "license_link", "pipeline_tag", "model_name")
TEXT_OR_TEXTS = ("tags", "language", "datasets", "base_model", "metrics")


def check_told(data: object, results: object, training: object, metadata: Mapping[str, Any]) -> None:
    """Refuse what a card can't hold; the arguments are those of `describe_adapter`.

    Raises:
        TypeError: if something is of a type that can't be written.
        ValueError: if a text can't be written, or would be read as something else.
    """
    if data is not None:
        _check_markdown(data)
    if results is not None:
        _check_results(results)
    if training is not None:
        if not isinstance(training, Mapping):
            raise TypeError(f"`training` must be a dict of hyperparameters by name, got {type(training).__name__}.")
        for name, value in training.items():
            _check_text(f"training[{name!r}]", name, lines=True)
            _check_characters(f"training[{name!r}]", str(value))
    for name, value in metadata.items():
        _check_field(name, value)


def _check_markdown(data: object) -> None:
    text = _check_text("data", data, lines=True)
    fence = open_fence(text)
    if fence:
        raise ValueError(
            f"`data` has a code block that isn't closed, so that all after it were code: end it by {fence}."
        )
    if RECORD.strip() in text:
        raise ValueError("`data` holds the comment by which a card tells what you changed: leave that to the card.")


def _check_results(results: object) -> None:
    if isinstance(results, (str, Mapping)) or not isinstance(results, Sequence):
        raise TypeError(
            f"`results` must be a list of huggingface_hub.EvalResult objects, got {type(results).__name__}."
        )
    wrong = [type(each).__name__ for each in results if not isinstance(each, EvalResult)]
    if wrong:
        raise TypeError(f"`results` has to hold huggingface_hub.EvalResult objects, got {wrong[0]}.")
    for number, result in enumerate(results):
        for each in fields(result):
            where, value = f"results[{number}].{each.name}", getattr(result, each.name)
            if each.name in ("task_type", "dataset_type", "dataset_name", "metric_type"):
                _check_text(where, value)
            elif each.name == "metric_value" and (value is None or isinstance(value, bool)):
                raise TypeError(f"`{where}` must be a number, got {value!r}.")
            else:
                _check_plain(where, value)


def _check_field(name: str, value: object) -> None:
    if name in OTHER_WAYS:
        raise ValueError(f"`{name}` isn't written by its name: give `{OTHER_WAYS[name]}`.")
    if name == "library_name" and value != "peft":
        raise ValueError(f"`library_name` is always 'peft', by which the Hub loads the files; got {value!r}.")
    _check_text("metadata", name)
    if name.startswith("#") or not name.isprintable():
        raise ValueError(f"{name!r} can't be the name of a field: it begins with '#' or isn't printable.")
    if value is None:
        return
    if name in TEXTS:
        _check_text(name, value)
    elif name in TEXT_OR_TEXTS:
        if not isinstance(value, (str, list)):
            raise TypeError(f"`{name}` must be a string or a list of strings, got {type(value).__name__}.")
        for each in [value] if isinstance(value, str) else value:
            _check_text(name, each)
    else:
        _check_plain(name, value)


def _check_text(name: str, value: object, lines: bool = False) -> str:
    """Refuse what is no text, an empty one, or one of several lines where there may be one."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {type(value).__name__}.")
    if not value.strip():
        raise ValueError(f"`{name}` is empty.")
    if not lines and len(value.splitlines()) > 1:
        raise ValueError(f"`{name}` must be a single line, got {value[:80]!r}.")
    _check_characters(name, value)
    return value


def _check_characters(name: str, text: str) -> None:
    if len(text) > LONGEST:
        raise ValueError(f"`{name}` must have at most {LONGEST:,} characters, got {len(text):,}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` can't be written as UTF-8: {error.reason} at character {error.start}.") from None
    wrong = next((c for c in text if not c.isprintable() and ord(c) < 32 and c not in "\t\n\r"), None)
    if wrong is not None:
        raise ValueError(f"`{name}` holds the control character {wrong!r}.")


def _check_plain(name: str, value: object, depth: int = 0) -> None:
    """Refuse what YAML has no form for."""
    if depth > 20:
        raise ValueError(f"`{name}` has lists within lists more than 20 deep.")
    if value is None or type(value) in (bool, int) or isinstance(value, datetime.date):
        return
    if isinstance(value, str):
        _check_characters(name, value)
    elif type(value) is float:  # NumPy's are floats, too, but YAML doesn't know them
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_plain(f"{name}[{index}]", each, depth + 1)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_text(f"{name}[{key!r}]", key)
            _check_plain(f"{name}[{key!r}]", each, depth + 1)
    else:
        raise TypeError(
            f"`{name}` must be text, a number, or lists and dicts of such, got {type(value).__name__}: turn it into "
            "such, by float() or list()."
        )
