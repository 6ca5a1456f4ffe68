"""What a script has saved, tried by a new process of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .processes import run_alone


def check_saved_adapter(
    script: str, adapter: Path, options: Sequence[str], expected: Mapping[str, float]
) -> dict[str, float]:
    """Load a saved adapter in a new process of a script, where it must give the same.

    Args:
        script: takes `--evaluate ADAPTER` and prints metrics, an object of JSON, as its last line.
        adapter: folder of the adapter.
        options: that `script` needs besides.
        expected: metrics of the adapter before it was saved.

    Returns:
        The metrics of the loaded adapter.

    Raises:
        SystemExit: if they differ from what was expected.
    """
    size = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    print(f"Adapter and head: {adapter} ({size / 1024:.0f} KiB)", flush=True)
    again: dict[str, float] = json.loads(
        run_alone(script, "--evaluate", str(adapter), *options, capture=True).splitlines()[-1]
    )
    if any(abs(again[name] - value) > 0.01 for name, value in expected.items()):
        raise SystemExit(f"The loaded adapter gives {again}, the trained one gave {dict(expected)}.")
    return again
