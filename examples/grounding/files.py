"""Feature archives and annotation files of the benchmarks, with errors that name the file and the line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from common import json_lines


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
        rows = self._open(folder, name, line, np.lib.format.read_array)
        self._check(rows.shape, folder, name, line)
        if not np.isfinite(rows).all():
            raise ValueError(f"{line}: {self._path(folder, name)} holds numbers that aren't finite.")
        return rows.astype(np.float32)

    def count(self, folder: Path, name: str, line: str) -> int:
        """The number of rows of one file, from its header; takes and raises what `read` does."""
        shape = self._open(folder, name, line, _read_shape)
        self._check(shape, folder, name, line)
        return int(shape[0])

    def _path(self, folder: Path, name: str) -> Path:
        return folder / self.path.format(name=name)

    def _open(self, folder: Path, name: str, line: str, read: Callable[[Any], Any]) -> Any:
        """What `read` finds in the array's file, of its own or in an archive."""
        path = self._path(folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"{line}: the features {path} aren't there.")
        try:
            if not zipfile.is_zipfile(path):
                with path.open("rb") as file:
                    return read(file)
            with zipfile.ZipFile(path) as archive:
                arrays = [member.removesuffix(".npy") for member in archive.namelist()]
                if self.key in arrays:
                    with archive.open(f"{self.key}.npy") as file:
                        return read(file)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{line}: {path} can't be read as {path.suffix[1:]}: {error}") from error
        raise ValueError(f"{line}: {path} has no array {self.key!r}, but {', '.join(map(repr, arrays))}.")

    def _check(self, shape: tuple[int, ...], folder: Path, name: str, line: str) -> None:
        if len(shape) != 2 or shape[1] != self.size or not shape[0]:
            raise ValueError(f"{line}: {self._path(folder, name)} holds {shape}, expected (rows, {self.size}).")


def _read_shape(file: BinaryIO) -> tuple[int, ...]:
    read = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(file) != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape: tuple[int, ...] = read(file)[0]
    return shape


@dataclass(frozen=True)
class StoredRows:
    """Features of one video, read from their files whenever `np.asarray` asks: a whole set doesn't fit into memory.

    Attributes:
        shape: `(rows, size)`.
        load: reads them, float32.
    """

    shape: tuple[int, int]
    load: Callable[[], np.ndarray]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.load()


@dataclass
class Sample:
    """One sentence about one video, or one video without a sentence.

    Attributes:
        name: what it is called in predictions: a query's id, or a video's.
        line: file and line that it comes from, for messages.
        video: `(clips, size)`, float32, read when it is used.
        seconds: length of the video.
        text: `(tokens, size)`, float32; None where there is no sentence.
        spans: what the sentence means, `(n, 2)`: centre and width as shares of the video; None where that isn't known.
        saliency: of each clip, from 0 to 1, `(clips,)`, float32; None where that isn't known.
        truth: the record that predictions are scored against.
    """

    name: Any
    line: str
    video: StoredRows
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
    for entry, line in json_lines.read_json_lines(path):
        empty = False
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


def read_video(
    sources: Sequence[Source],
    folder: Path,
    name: str,
    line: str,
    *,
    labels: np.ndarray | None = None,
    most: int | None = None,
    epsilon: float | None = None,
    endpoints: bool = False,
) -> tuple[StoredRows, np.ndarray]:
    """A video's features side by side, and labels of the same clips, cut to the shortest of all.

    Args:
        sources: of the features.
        folder: the data folder.
        name: of the video.
        line: what names it, for messages.
        labels: `(clips, ...)`; none by default.
        most: clips that are read of each source; all by default.
        epsilon: scale the rows of each source to length 1, by x / (norm + epsilon); as they are by default.
        endpoints: append where each clip starts and ends, as shares of all.

    Returns:
        `(clips, sum of sizes)`, two more with endpoints, and the labels.

    Raises:
        FileNotFoundError: if a file isn't there.
        ValueError: if one isn't as its source says, or their lengths are more than two rows apart.
    """
    counts = {str(folder / source.path.format(name=name)): source.count(folder, name, line) for source in sources}
    if labels is not None:
        counts["labels"] = len(labels)
    counts = {what: min(count, most or count) for what, count in counts.items()}
    length = min(counts.values())
    if max(counts.values()) - length > ROWS_APART:
        which = ", ".join(f"{what} {count}" for what, count in counts.items())
        raise ValueError(
            f"{line}: the rows of one video differ by more than {ROWS_APART}: {which}. They aren't of the same video, "
            "or were made at another rate."
        )
    load = partial(_load, tuple(sources), folder, name, line, length, epsilon, endpoints)
    size = sum(source.size for source in sources) + 2 * endpoints
    return StoredRows((length, size), load), np.zeros(0) if labels is None else labels[:length]


def _load(
    sources: Sequence[Source],
    folder: Path,
    name: str,
    line: str,
    length: int,
    epsilon: float | None,
    endpoints: bool,
) -> np.ndarray:
    rows = [source.read(folder, name, line)[:length] for source in sources]
    if epsilon is not None:
        rows = [of_length_one(each, epsilon) for each in rows]
    if endpoints:
        edges = np.arange(length + 1, dtype=np.float32) / length
        rows += [edges[:-1, None], edges[1:, None]]
    return np.concatenate(rows, axis=1)


def of_length_one(rows: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Rows `(n, size)` divided by their norm plus epsilon."""
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(epsilon))


def spans_of(windows: Sequence[Sequence[float]], seconds: float) -> np.ndarray:
    """Windows `(n, 2)` in seconds as centres and widths, shares of a length in seconds: `(n, 2)`, float32."""
    start, end = np.array(windows, dtype=np.float32).T / np.float32(seconds)
    return np.stack([(start + end) / 2, end - start], axis=1)
