"""Folders that are written once and whole, and folders that aren't overwritten."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


RESULTS = "results.json"


def is_made(folder: Path) -> bool:
    """Whether a folder is there that `finished` writes; clears away what killed runs have left of it."""
    ours = re.compile(rf"(\.{re.escape(folder.name)}-[0-9a-f]{{32}})(\.lock)?")
    found = [ours.fullmatch(path.name) for path in folder.parent.glob(".*")]
    for name in {match[1] for match in found if match}:
        lock = FileLock(folder.parent / f"{name}.lock")
        try:
            with lock.acquire(blocking=False):  # else its run lives
                shutil.rmtree(folder.parent / name, ignore_errors=True)
        except Timeout:
            continue
        Path(lock.lock_file).unlink(missing_ok=True)
    return folder.exists()


@contextmanager
def finished(folder: Path) -> Iterator[Path]:
    """A draft of `folder` to write to, which takes its name once it is complete: an interrupted run leaves none.

    If another run has made the folder meanwhile, that one is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_made(folder)
    draft = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    lock = FileLock(f"{draft}.lock")
    with lock:  # before there is a draft, which another run would take for one that was left
        try:
            draft.mkdir()
            yield draft
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def check_output(folder: Path) -> None:
    """Refuse to write into a folder that holds something else than an earlier run of this script."""
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise SystemExit(f"{folder} isn't empty and wasn't written by this script: choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
