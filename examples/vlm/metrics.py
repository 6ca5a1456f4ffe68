"""How good generated answers are: moments in seconds, sentences, or words that have to be the same."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy.optimize import linear_sum_assignment

from .data import Sample, Window


Parse = Callable[[str], list[Window]]
METRICS = ("auto", "grounding", "rouge", "exact")
OVERLAPS = (0.3, 0.5, 0.7)
# 7, 7.5, 7.5 s, 1:07 or 0:01:07.5; and two of them with a word or a dash in between.
_TIME = r"(\d+(?::\d{1,2}){0,2}(?:\.\d+)?)"
_UNIT = r"\s*(?:s|sec|secs|seconds?)?\b\.?"
_WINDOW = re.compile(rf"{_TIME}{_UNIT}\s*(?:to|until|till|and|-|–|—)\s*{_TIME}", re.IGNORECASE)  # noqa: RUF001


def parse_windows(text: str) -> list[Window]:
    """The windows that a text says, as JSON (`[[3, 7.5]]`, `{"start": 3, "end": 7.5}`) or in words.

    Words are "from 3.0 to 7.5 seconds", "3 - 7.5", "between 0:03 and 0:07.5" and the like.

    Returns:
        `(start, end)` in seconds each, in the order of the text; none that ends before it starts.

    Example:
        >>> parse_windows("From 0:03 to 0:07.5, and 70s - 80s.")
        [(3.0, 7.5), (70.0, 80.0)]
    """
    found = _windows_of_json(text)
    if not found:
        found = [(_seconds(start), _seconds(end)) for start, end in _WINDOW.findall(text)]
    return [(start, end) for start, end in found if 0 <= start < end]


def choose_metric(name: str, samples: Sequence[Sample]) -> str:
    """What `"auto"` means for some samples: grounding where all have windows, ROUGE for sentences, else exact."""
    if name != "auto":
        return name
    if all(sample.windows for sample in samples):
        return "grounding"
    return "exact" if all(sample.kind == "question" for sample in samples) else "rouge"


def score(
    answers: Sequence[str], samples: Sequence[Sample], metric: str, parse: Parse = parse_windows
) -> dict[str, float]:
    """Mean over the samples, in per cent.

    Args:
        answers: what a model said.
        samples: what it was asked, with true answers.
        metric: one of `METRICS` but `"auto"`.
        parse: reads windows in an answer.

    Returns:
        For `"grounding"`: `mIoU`, intersection over union, where several windows are matched one to one so that they
        overlap the most, and one that is missing or too many counts as 0; `R1@0.3` and so on, how often the first
        window said overlaps some true one that far; `parsed`, how often the answer says a window at all. For
        `"rouge"`: F of `rouge1`, `rouge2`, `rougeL`. For `"exact"`: `exact`, how often it is the true answer but for
        case, punctuation, articles and spaces.
    """
    function = {"grounding": _grounding, "rouge": _rouge, "exact": _exact}[metric]
    rows = [function(said, sample, parse) for said, sample in zip(answers, samples, strict=True)]
    return {name: 100 * float(np.mean([row[name] for row in rows])) for name in rows[0]}


def true_windows(sample: Sample, parse: Parse = parse_windows) -> list[Window]:
    """Those of a sample, read off its answer where the line names none."""
    return sample.windows if sample.windows is not None else parse(sample.answer or "")


def _grounding(said: str, sample: Sample, parse: Parse) -> dict[str, float]:
    truth, found = true_windows(sample, parse), parse(said)
    if not truth:
        raise ValueError(f"{sample.line}: neither `relevant_windows` nor the answer tells a window to compare with.")
    overlaps = np.array([[_overlap(a, b) for b in truth] for a in found]).reshape(len(found), len(truth))
    matched = overlaps[linear_sum_assignment(-overlaps)]
    recalls = {f"R1@{least}": float((overlaps[:1] >= least).any()) for least in OVERLAPS}
    return {"mIoU": float(matched.sum()) / max(overlaps.shape), **recalls, "parsed": float(bool(found))}


def _overlap(a: Window, b: Window) -> float:
    """Intersection over union."""
    both = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return both / (a[1] - a[0] + b[1] - b[0] - both)


class _Words:
    """rouge-score's own tokenizer keeps ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


_scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


def _rouge(said: str, sample: Sample, parse: Parse) -> dict[str, float]:
    return {name: value.fmeasure for name, value in _scorer.score(sample.answer or "", said).items()}


def _exact(said: str, sample: Sample, parse: Parse) -> dict[str, float]:
    return {"exact": float(_normalised(said) == _normalised(sample.answer or ""))}


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if char in string.punctuation else char for char in text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _seconds(time: str) -> float:
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _windows_of_json(text: str) -> list[Window]:
    """All pairs of numbers in the first value of JSON in a text."""
    for start in (index for index, char in enumerate(text) if char in "[{"):
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:])
        except json.JSONDecodeError:
            continue
        return list(_pairs(value))
    return []


def _pairs(value: Any) -> list[Window]:
    if isinstance(value, dict):
        value = [value["start"], value["end"]] if {"start", "end"} <= set(value) else list(value.values())
    if not isinstance(value, list):
        return []
    times = [_time_of(item) for item in value]
    if len(times) == 2 and times[0] is not None and times[1] is not None:
        return [(times[0], times[1])]
    return [pair for item in value for pair in _pairs(item)]


def _time_of(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    whole = re.fullmatch(rf"\s*{_TIME}{_UNIT}\s*", value) if isinstance(value, str) else None
    return _seconds(whole[1]) if whole else None
