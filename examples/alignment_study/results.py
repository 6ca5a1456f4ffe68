"""What the runs of `benchmarks/pvla_pairs.py` gave: a file of them, what is chosen by it, and tables."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .rows import ALONE, OPTIONS, ROWS, STEPS, TUNING_SEEDS, Run


class Results:
    """Finished runs in a file, which is written anew, whole, after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []

    def of(self, **fields: Any) -> list[dict[str, Any]]:
        """Those with these fields."""
        return [entry for entry in self.entries if all(entry[name] == value for name, value in fields.items())]

    def add(self, run: Run, found: dict[str, Any]) -> None:
        """Keep what a run gave."""
        self.entries.append(asdict(run) | found)
        draft = self.path.with_suffix(".draft")
        lines = ",\n".join(json.dumps(entry) for entry in self.entries)
        draft.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(draft, self.path)


def chosen_options(results: Results, row: str) -> tuple[float, float]:
    """Weight and rate: the best on validation, by the mean over the seeds on which the most of them were tried."""
    like = ROWS[row].like
    if isinstance(like, tuple):
        return like
    row = like or row
    tried: dict[tuple[float, float], list[float]] = {OPTIONS[0]: []}
    for entry in results.of(row=row):
        if entry["seed"] >= TUNING_SEEDS[0]:
            tried.setdefault((entry["weight"], entry["rate"]), []).append(entry["validation mAP"])
    most = max(len(values) for values in tried.values())
    return max((o for o, v in tried.items() if len(v) == most), key=lambda o: sum(tried[o]))


def table(results: Results, task: str, labels: int) -> str:
    """Of one cell the results, and the differences to READ alone on the same seeds, in markdown."""
    columns = ["method (weight; rate)", "seeds", "test mAP", "difference", "by seed", "matching", "word; frames"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    found = {name: by_seed(results, task, labels, name) for name in ROWS}
    for name, entries in found.items():
        if not entries:
            continue
        both = found[ALONE].keys() & entries.keys() if name != ALONE else set()
        differences = [entries[seed]["test mAP"] - found[ALONE][seed]["test mAP"] for seed in sorted(both)]
        weight, rate = chosen_options(results, name)
        cells = [
            f"{name} ({rate:g})" if ROWS[name].pvla is None else f"{name} ({weight:g}; {rate:g})",
            str(len(entries)),
            mean_and_spread([entry["test mAP"] for entry in entries.values()]),
            mean_and_spread(differences, "+") if differences else "",
            ", ".join(f"{each:+.1f}" for each in differences),
            mean_and_spread([entry["mAP of matching by cosine"] for entry in entries.values()]),
            _plans(list(entries.values())),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plans(entries: Sequence[dict[str, Any]]) -> str:
    """Of the plans' mass what goes to the digit's word, in per cent, and to relevant frames, over their share."""
    names = ("mass on the digit's word", "mass on relevant frames, over their share")
    if any(name not in entry for entry in entries for name in names):
        return ""
    word, frames = (statistics.mean(entry[name] for entry in entries) for name in names)
    return f"{100 * word:.0f} %; {frames:.1f}"


def by_seed(results: Results, task: str, labels: int, name: str) -> dict[int, dict[str, Any]]:
    """A row's results with the weight and the rate that were chosen for it."""
    weight, rate = chosen_options(results, name)
    steps = STEPS[task] * ROWS[name].longer
    entries = results.of(task=task, labels=labels, row=name, weight=weight, rate=rate, steps=steps)
    return {entry["seed"]: entry for entry in entries if entry["seed"] < TUNING_SEEDS[0]}


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """For a table: `12.3 ± 0.4`."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"
