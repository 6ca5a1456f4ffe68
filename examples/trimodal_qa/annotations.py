"""Clips with questions and their answers in time, from files on disk."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.annotations import is_span, read_entries


@dataclass(frozen=True)
class Annotation:
    """One question about one clip.

    Attributes:
        video: path of the clip, which may have a sound track.
        query: the question.
        split: `"train"`, `"validation"` or `"test"`.
        answers: `(start, end, answer)` in seconds; at other times there is no answer.
        line: `path:line` of the annotation, for messages.
    """

    video: Path
    query: str
    split: str
    answers: tuple[tuple[float, float, str], ...]
    line: str

    def at(self, seconds: Sequence[float]) -> list[str | None]:
        """The answer at each of these seconds, None where there is none."""
        return [next((answer for start, end, answer in self.answers if start <= time < end), None) for time in seconds]


def read_annotations(folder: Path) -> list[Annotation]:
    """Read `annotations.jsonl` of a data folder.

    Each line is an object with `video` (a path relative to the folder), `query`, `split` and `answers`, a list of
    `[start, end, answer]` in seconds.

    Raises:
        FileNotFoundError: if the file, or a video that it names, isn't there.
        ValueError: if a line isn't such an object, or no training clip has an answer; the message says which line.
    """
    annotations = [_annotation(entry, folder, line) for entry, line in read_entries(folder)]
    known = answers_of(annotations)
    if not known:
        raise ValueError(f"{folder}: no line with split 'train' has any `answers`, so there is nothing to learn.")
    for annotation in annotations:
        for _, _, answer in annotation.answers:
            if answer not in known:
                raise ValueError(f"{annotation.line}: the answer {answer!r} isn't in any line with split 'train'.")
    return annotations


def answers_of(annotations: list[Annotation]) -> list[str]:
    """All answers of the training clips, sorted."""
    return sorted({answer for each in annotations if each.split == "train" for _, _, answer in each.answers})


def _annotation(entry: dict[str, Any], folder: Path, line: str) -> Annotation:
    answers = entry.get("answers")
    if not isinstance(answers, list) or not all(map(_is_answer, answers)):
        raise ValueError(
            f"{line}: `answers` must be a list of [start, end, answer], start < end, got {reprlib.repr(answers)}."
        )
    ordered = sorted((float(start), float(end), answer) for start, end, answer in answers)
    for (_, end, _), (start, _, _) in pairwise(ordered):
        if start < end:
            raise ValueError(f"{line}: two `answers` overlap at {start} seconds; a frame has one at most.")
    return Annotation(folder / entry["video"], entry["query"], entry["split"], tuple(ordered), line)


def _is_answer(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and is_span(value[:2])
        and isinstance(value[2], str)
        and bool(value[2])
    )
