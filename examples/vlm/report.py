"""What the script leaves: a table, answers beside the truth, a picture, and files of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .collator import VlmCollator
from .data import Sample
from .metrics import Parse, true_windows


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


SHOWN = 3


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """The test scores of each row."""
    names = list(next(iter(results.values()))["test"])
    print(f"\n{'':22} {'weights':>9} {'seconds':>8} " + " ".join(f"{name:>7}" for name in names))
    for row, result in results.items():
        scores = " ".join(f"{result['test'][name]:7.1f}" for name in names)
        print(f"{row:22} {result['trainable weights']:9,} {result['seconds']:8} {scores}")


def print_answers(samples: Sequence[Sample], answers: dict[str, list[str]]) -> None:
    """A few questions, with the truth and what each row says."""
    for index, sample in enumerate(samples[:SHOWN]):
        print(f"\n{sample.video.name}: {sample.question}\n  {'truth':22} {sample.answer}")
        for row, said in answers.items():
            print(f"  {row:22} {said[index]}")


def write_predictions(path: Path, samples: Sequence[Sample], answers: dict[str, list[str]], parse: Parse) -> None:
    """An object of JSON a line: a sample, and what each row says."""
    with path.open("w", encoding="utf-8") as file:
        for index, sample in enumerate(samples):
            line: dict[str, Any] = {"video": str(sample.video), "question": sample.question, "truth": sample.answer}
            said = {row: texts[index] for row, texts in answers.items()}
            if sample.windows is not None:
                line["windows"] = {"truth": sample.windows} | {row: parse(text) for row, text in said.items()}
            file.write(json.dumps({**line, "answers": said}, ensure_ascii=False) + "\n")


def draw(
    path: Path, collator: VlmCollator, samples: Sequence[Sample], answers: dict[str, list[str]], parse: Parse
) -> None:
    """Draw the frames of a few videos, with true and said moments over time where answers tell any."""
    figure, axes = plt.subplots(2 * len(samples), 1, figsize=(13, 3.4 * len(samples)), squeeze=False)
    for index, sample in enumerate(samples):
        frames, metadata = collator.video(sample)
        upper, lower = axes[2 * index : 2 * index + 2, 0]
        height, width = frames.shape[1:3]
        duration = float(metadata.duration)
        upper.imshow(np.concatenate(list(frames), axis=1), extent=(0, duration, 0, 1), aspect="auto")
        upper.set(title=sample.question, xticks=[], yticks=[])
        upper.set_box_aspect(height / width / len(frames))
        said = {row: texts[index] for row, texts in answers.items()}
        rows = {"truth": (sample.answer or "", true_windows(sample, parse))}
        rows |= {row: (text, parse(text)) for row, text in said.items()}
        _draw_rows(lower, rows, duration)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_rows(axis: Axes, rows: dict[str, tuple[str, list[tuple[float, float]]]], duration: float) -> None:
    """A line for each row: its windows as bars, or its words."""
    for place, (text, windows) in enumerate(rows.values()):
        bars = [(start, end - start) for start, end in windows]
        axis.broken_barh(bars, (place - 0.4, 0.8), color=f"C{place}", alpha=0.6)
        if not windows:
            shown = "".join(char if char.isprintable() else " " for char in text[:150]).replace("$", r"\$")
            axis.text(0, place, shown.strip() or "(nothing)", va="center", fontsize=8)
    axis.set(xlim=(0, duration), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=list(rows))
