"""Feature archives and annotation files of the benchmarks, with errors that name the file and the line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


# Features of one video from different networks differ by a row or two in length; more is another video.
ROWS_APART = 2


@dataclass(frozen=True)
class Source:
    """Where the features of one network lie: a file for each video, or for each query.

    Attributes:
        path: of a file below the data folder, with `{name}` for the video's or query's name.
        size: of a row.
        key: of the array in an npz file; None for npy files, which hold one array.
    """

    path: str
    size: int
    key: str | None = "features"

    def read(self, folder: Path, name: str, line: str) -> np.ndarray:
        """The rows of one file, `(rows, size)`, float32.

        Args:
            folder: the data folder.
            name: of the video or query.
            line: what names it, for messages.

        Raises:
            FileNotFoundError: if the file isn't there.
            ValueError: if it can't be read, has no such array, or one of another shape; the message names the file.
        """
        path = folder / self.path.format(name=name)
        if not path.is_file():
            raise FileNotFoundError(f"{line}: the features {path} aren't there.")
        try:
            with path.open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                archive = not isinstance(stored, np.ndarray)
                if archive and self.key not in stored:
                    names = ", ".join(map(repr, stored.files))
                    raise KeyError(f"{line}: {path} has no array {self.key!r}, but {names}.")
                rows = stored[self.key] if archive else stored
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{line}: {path} can't be read as {path.suffix[1:]}: {error}") from error
        if rows.ndim != 2 or rows.shape[1] != self.size or not len(rows):
            raise ValueError(f"{line}: {path} holds {rows.shape}, expected (rows, {self.size}).")
        if not np.isfinite(rows).all():
            raise ValueError(f"{line}: {path} holds numbers that aren't finite.")
        return rows.astype(np.float32)


@dataclass
class Sample:
    """One sentence about one video, or one video without a sentence.

    Attributes:
        name: what it is called in predictions: a query's id, or a video's.
        line: file and line that it comes from, for messages.
        video: `(clips, size)`, float32.
        seconds: length of the video.
        text: `(tokens, size)`, float32; None where there is no sentence.
        spans: what the sentence means, `(n, 2)`: centre and width as shares of the video; None where that isn't known.
        saliency: of each clip, from 0 to 1, `(clips,)`, float32; None where that isn't known.
        truth: the record that predictions are scored against.
    """

    name: Any
    line: str
    video: np.ndarray
    seconds: float
    text: np.ndarray | None = None
    spans: np.ndarray | None = None
    saliency: np.ndarray | None = None
    truth: dict[str, Any] = field(default_factory=dict)


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a jsonl file, each with its `path:line`.

    Raises:
        FileNotFoundError: if the file isn't there.
        ValueError: if a line is no JSON object, or there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The annotations {path} aren't there.")
    empty = True
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        empty, line = False, f"{path}:{number}"
        try:
            entry = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{line}: not valid JSON ({error}).") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{line}: expected an object, got {type(entry).__name__}.")
        yield entry, line
    if empty:
        raise ValueError(f"{path} has no lines.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: if the file isn't there.
        ValueError: if it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} isn't there.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}.")
    return content


def cut_to_shortest(rows: Sequence[np.ndarray], names: Sequence[str], line: str) -> list[np.ndarray]:
    """Features of one video from several sources, and what goes with them, all as long as the shortest.

    Args:
        rows: `(length, ...)` each; the start is kept.
        names: what each is, for messages.
        line: what names the video, for messages.

    Raises:
        ValueError: if their lengths are more than two rows apart.
    """
    lengths = [len(each) for each in rows]
    if max(lengths) - min(lengths) > ROWS_APART:
        which = ", ".join(f"{name} {length}" for name, length in zip(names, lengths, strict=True))
        raise ValueError(
            f"{line}: the rows of one video differ by more than {ROWS_APART}: {which}. They aren't of the same video, "
            "or were made at another rate."
        )
    return [each[: min(lengths)] for each in rows]


def read_video(
    sources: Sequence[Source],
    folder: Path,
    name: str,
    line: str,
    *,
    labels: Sequence[np.ndarray] = (),
    most: int | None = None,
    epsilon: float | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A video's features side by side, and labels of the same clips, cut to the shortest of all.

    Args:
        sources: of the features.
        folder: the data folder.
        name: of the video.
        line: what names it, for messages.
        labels: `(clips, ...)` each.
        most: clips that are read of each source; all by default.
        epsilon: scale the rows of each source to length 1, by x / (norm + epsilon); as they are by default.

    Returns:
        `(clips, sum of sizes)`, and the labels.
    """
    rows = [source.read(folder, name, line)[:most] for source in sources]
    if epsilon is not None:
        rows = [of_length_one(each, epsilon) for each in rows]
    names = [str(folder / source.path.format(name=name)) for source in sources] + ["labels"] * len(labels)
    cut = cut_to_shortest([*rows, *(label[:most] for label in labels)], names, line)
    return np.concatenate(cut[: len(rows)], axis=1), cut[len(rows) :]


def of_length_one(rows: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Rows `(n, size)` divided by their norm plus epsilon."""
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(epsilon))


def spans_of(windows: Sequence[Sequence[float]], seconds: float) -> np.ndarray:
    """Windows `(n, 2)` in seconds as centres and widths, shares of a length in seconds: `(n, 2)`, float32."""
    start, end = np.array(windows, dtype=np.float32).T / np.float32(seconds)
    return np.stack([(start + end) / 2, end - start], axis=1)


def with_endpoints(rows: np.ndarray) -> np.ndarray:
    """Rows `(n, size)` with where each starts and ends, as shares of all: `(n, size + 2)`."""
    edges = np.arange(len(rows) + 1, dtype=np.float32) / len(rows)
    return np.concatenate([rows, edges[:-1, None], edges[1:, None]], axis=1)
