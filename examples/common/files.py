"""Folders that are written once and whole, and folders that aren't overwritten."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


RESULTS = "results.json"


@contextmanager
def finished(folder: Path) -> Iterator[Path]:
    """A draft of `folder` to write to, which takes its name once it is complete: an interrupted run leaves none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield draft
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_output(folder: Path) -> None:
    """Refuse to write into a folder that holds something else than an earlier run of this script."""
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise SystemExit(f"{folder} isn't empty and wasn't written by this script: choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
