"""Files with one JSON object a line, whoever wrote them: each fault has its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a file, each with its `path:line` for messages; empty lines are left out.

    A line ends at a newline alone: JSON may hold the other characters at which Python splits lines.

    Raises:
        ValueError: if a line isn't UTF-8, or no JSON object; the message names the line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{line}: not UTF-8 ({error.reason} at byte {error.start} of the line).") from None
            if text.strip():
                yield _object(text, line), line


def _object(text: str, line: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(text)
    except RecursionError:
        raise ValueError(f"{line}: lists or objects within each other, too many to be read.") from None
    except ValueError as error:  # also for a number of thousands of digits
        raise ValueError(f"{line}: not valid JSON ({str(error)[:200]}).") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{line}: expected an object with 'video', ..., got {type(entry).__name__}.")
    return entry
