"""Charades-STA: the moment that a sentence means.

    charades_sta_train.txt, charades_sta_test.txt, glove.6B.300d.txt
    rgb_features/{id}.npy, and audio_features/{id}.npy or opt_features/{id}.npy

A line is `ABCDE 3.4 12.0##a person opens a door.`: a video, start and end in seconds, and the sentence. A row of
features is a sixth of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .files import Sample, Source, StoredRows, read_video, spans_of
from .metrics import interval_overlap


ANNOTATIONS, VECTORS = "charades_sta_{split}.txt", "glove.6B.300d.txt"
RGB = Source("rgb_features/{name}.npy", 4096, None)
SOURCES = {
    "va": (RGB, Source("audio_features/{name}.npy", 2048, None)),
    "vo": (RGB, Source("opt_features/{name}.npy", 4096, None)),
}
ROW_SECONDS = 1 / 6
WORD_SIZE = 300
EPSILON = 1e-12
SOFTNESS = 0.5  # of the suppression of overlapping windows


def read_charades_sta(
    folder: Path,
    split: str,
    video: Sequence[Source] = SOURCES["va"],
    vectors: str = VECTORS,
    word_size: int = WORD_SIZE,
) -> list[Sample]:
    """The sentences of a split with their features, as UMT prepares them.

    Each source's rows are scaled to length 1; they are cut to the shortest and put side by side. Boundaries the wrong
    way round are swapped. A sentence loses its full stop, is lower-cased and split on blanks; a word without a vector
    is zero.

    Args:
        folder: holds the annotations, the word vectors and the folders of features.
        split: `"train"` or `"test"`.
        video: sources of each row: `SOURCES["va"]` (pictures and sound) or `SOURCES["vo"]` (pictures and motion).
        vectors: the file of word vectors, a word and its numbers a line.
        word_size: numbers of a word.

    Raises:
        FileNotFoundError: if a file isn't there.
        ValueError: if a line or a file isn't as above; the message says which.
    """
    path = folder / ANNOTATIONS.format(split=split)
    if not path.is_file():
        raise FileNotFoundError(f"The annotations {path} aren't there.")
    lines = path.read_text(encoding="utf-8").splitlines()
    queries = [_query(text, f"{path}:{n}") for n, text in enumerate(lines, start=1) if text.strip()]
    if not queries:
        raise ValueError(f"{path} has no lines.")
    embeddings = read_vectors(folder / vectors, {word for _, _, words, _ in queries for word in words}, word_size)
    features: dict[str, StoredRows] = {}
    samples = []
    for number, (name, window, words, line) in enumerate(queries):
        if name not in features:
            features[name] = read_video(video, folder, name, line, epsilon=EPSILON)[0]
        text = np.stack([embeddings.get(word, np.zeros(word_size, dtype=np.float32)) for word in words])
        seconds = len(features[name]) * ROW_SECONDS
        spans, truth = spans_of([window], seconds), {"window": list(window)}
        samples.append(Sample(number, line, features[name], seconds, text, spans, truth=truth))
    return samples


def read_vectors(path: Path, words: set[str], size: int) -> dict[str, np.ndarray]:
    """The vectors of some words, `(size,)` each, from a file of GloVe's form.

    Raises:
        FileNotFoundError: if the file isn't there.
        ValueError: if a line of one of the words has another number of numbers; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The word vectors {path} aren't there: GloVe 6B, of {size} dimensions.")
    found = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            word, _, numbers = line.rstrip("\n").partition(" ")
            if word not in words:
                continue
            try:
                vector = np.array(numbers.split(), dtype=np.float32)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a word and numbers ({error}).") from error
            if vector.shape != (size,):
                raise ValueError(f"{path}:{number}: {len(vector)} numbers, expected {size}.")
            found[word] = vector
    return found


def charades_recall(windows: Mapping[int, np.ndarray], truth: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """How often the window of a sentence is among the first predicted ones, as UMT computes it, in per cent.

    Windows that overlap better ones lose score first: soft suppression, by exp(-IoU^2 / 0.5).

    Args:
        windows: of each sentence, `(n, 3)`: start, end and score; none count as a miss.
        truth: of each sentence, start and end.

    Returns:
        `Rank1@0.5`, `Rank1@0.7`, `Rank5@0.5`, `Rank5@0.7`: the share of sentences whose first window, or one of whose
        first five, has that IoU.

    Raises:
        ValueError: if the two don't have the same sentences.
    """
    if not truth or windows.keys() != truth.keys():
        raise ValueError("Windows and truth must be of the same sentences.")
    result = {}
    ranked = {name: suppress_softly(np.asarray(each, dtype=float).reshape(-1, 3)) for name, each in windows.items()}
    for ranks in (1, 5):
        best = [
            interval_overlap(np.asarray(window, dtype=float), ranked[name][:ranks, :2]).max(initial=0.0)
            for name, window in truth.items()
        ]
        for threshold in (0.5, 0.7):
            result[f"Rank{ranks}@{threshold}"] = 100 * float(np.mean(np.array(best) >= threshold))
    return result


def suppress_softly(windows: np.ndarray) -> np.ndarray:
    """Windows `(n, 3)`, the best first, each having lowered the scores of what overlaps it."""
    left, ranked = windows.copy(), []
    while len(left):
        best = int(left[:, 2].argmax())
        chosen, left = left[best], np.delete(left, best, axis=0)
        left[:, 2] *= np.exp(-(interval_overlap(chosen[:2], left[:, :2]) ** 2) / SOFTNESS)
        ranked.append(chosen)
    order = np.argsort([-window[2] for window in ranked], kind="stable")
    return np.array(ranked).reshape(-1, 3)[order]


def _query(text: str, line: str) -> tuple[str, tuple[float, float], list[str], str]:
    head, mark, sentence = text.partition("##")
    parts = head.split()
    sentence = sentence.strip()
    words = sentence.removesuffix(".").lower().split()
    try:
        name, start, end = parts[0], float(parts[1]), float(parts[2])
    except (IndexError, ValueError) as error:
        raise ValueError(f"{line}: expected `video start end##sentence`, got {text!r}.") from error
    if len(parts) != 3 or not mark or not words:
        raise ValueError(f"{line}: expected `video start end##sentence`, got {text!r}.")
    if not (np.isfinite([start, end]).all() and min(start, end) >= 0):
        raise ValueError(f"{line}: start and end must be seconds from 0 on, got {start} and {end}.")
    return name, (min(start, end), max(start, end)), words, line
