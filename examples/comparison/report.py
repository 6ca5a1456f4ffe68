"""Tables and pictures of a comparison, from its results alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .methods import METHODS


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


Results = Sequence[dict[str, Any]]
REFERENCE = "read-gru"  # with which the others are compared, base by base


def of_setting(results: Results, panel: str, videos: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """By method, the runs of a setting with the method's chosen rate, one a seed, in the order of `METHODS`."""
    rates = {(r["panel"], r["method"]): r["rate"] for r in results if r.get("chosen")}
    found: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        runs = [
            r
            for r in results
            if (r["panel"], r["method"], r["videos"], r["steps"]) == (panel, method, videos, steps)
            and r["rate"] == rates.get((panel, method))
        ]
        if runs:
            found[method] = sorted(runs, key=lambda run: run["seed"])
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one value, itself."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def beside_reference(runs: Results, reference: Results, metric: str) -> str:
    """A method's score minus the reference's on the same base, and on how many of the bases the method is ahead.

    Args:
        runs: of the method, one a base.
        reference: the runs of `REFERENCE`.
        metric: the score.
    """
    theirs = {run["seed"]: run["test"][metric] for run in reference}
    gains = [run["test"][metric] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    if not gains or runs == reference:
        return ""
    spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
    return f"{statistics.mean(gains):+.1f}{spread} ({sum(gain > 0 for gain in gains)} of {len(gains)})"


def table(
    results: Results, panel: str, videos: int, steps: int, metrics: Sequence[str], memory: dict[str, float]
) -> str:
    """The table of a setting, as markdown.

    Args:
        results: of all runs.
        panel: the task.
        videos: that were trained on.
        steps: of training.
        metrics: columns, names of test scores.
        memory: of each method, peak memory in MiB, where it was measured.
    """
    beside = f"{metrics[0]} minus {METHODS[REFERENCE].label}'s (ahead)"
    columns = ["method", *metrics, beside, "bases", "weights", "rate", "CPU s a step", "peak MiB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    methods = of_setting(results, panel, videos, steps)
    for method, runs in methods.items():
        cells = [mean_and_spread([run["test"][metric] for run in runs]) for metric in metrics]
        cells.append(beside_reference(runs, methods.get(REFERENCE, []), metrics[0]))
        seconds = statistics.median(run["cpu_seconds_a_step"] for run in runs)
        peak = f"{memory[method]:.0f}" if method in memory else "-"
        cells += [str(len(runs)), f"{runs[0]['weights']:,}", f"{runs[0]['rate']:g}", f"{seconds:.3f}", peak]
        lines.append(f"| {METHODS[method].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_by_videos(results: Results, panel: str, counts: Sequence[int], steps: int, metric: str) -> str:
    """The score of each method by the number of training videos, as markdown; in brackets, how many bases if not all.

    Args:
        results: of all runs.
        panel: the task.
        counts: of training videos, a column each.
        steps: of training.
        metric: the score.
    """
    found = {count: of_setting(results, panel, count, steps) for count in counts}
    bases = max((len(runs) for methods in found.values() for runs in methods.values()), default=0)

    def told(runs: Results) -> str:
        few = f" ({len(runs)})" if len(runs) < bases else ""
        return mean_and_spread([run["test"][metric] for run in runs]) + few if runs else "-"

    lines = [f"| method | {' | '.join(map(str, counts))} |", "|---" * (1 + len(counts)) + "|"]
    for method in METHODS:
        runs_of = [found[count].get(method, []) for count in counts]
        if any(runs_of):
            lines.append(f"| {METHODS[method].label} | {' | '.join(map(told, runs_of))} |")
    return "\n".join(lines)


def draw(
    path: Path, results: Results, panels: Sequence[str], metrics: dict[str, str], videos: int, steps: int
) -> None:
    """Draw each panel: test score against trained weights, against training videos, and validation curves.

    Args:
        path: the PNG to write.
        results: of all runs.
        panels: the tasks, a row each.
        metrics: of each panel, the score.
        videos: of the first and the last picture.
        steps: likewise, and of the second.
    """
    figure, axes = plt.subplots(len(panels), 3, figsize=(16, 4.6 * len(panels)), squeeze=False, layout="constrained")
    for row, panel in zip(axes, panels, strict=True):
        metric = metrics[panel]
        runs = of_setting(results, panel, videos, steps)
        for method, some in runs.items():
            style = {"color": plt.get_cmap("tab20")(list(METHODS).index(method)), "label": METHODS[method].label}
            _draw_weights(row[0], some, metric, style)
            _draw_videos(row[1], results, panel, method, steps, metric, style)
            steps_seen = [step for step, _ in some[0]["validation_curve"]]
            curves = zip(*([score for _, score in run["validation_curve"]] for run in some), strict=True)
            row[2].plot(steps_seen, [statistics.mean(scores) for scores in curves], **style)
        row[0].set(xscale="log", xlabel="trained weights", ylabel=f"test {metric}", title=f"{panel}: {videos} videos")
        row[1].set(xscale="log", xlabel="training videos", title=f"{panel}: {steps} steps")
        counts = sorted({run["videos"] for run in results})
        row[1].set_xticks(counts, list(map(str, counts)))
        row[1].minorticks_off()
        row[2].set(xlabel="steps", ylabel=f"validation {metric}", title=f"{panel}: learning curves")
        row[2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_weights(axis: Axes, runs: Results, metric: str, style: dict[str, Any]) -> None:
    values = [run["test"][metric] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    axis.errorbar(runs[0]["weights"], statistics.mean(values), spread, fmt="o", **style)


def _draw_videos(
    axis: Axes, results: Results, panel: str, method: str, steps: int, metric: str, style: dict[str, Any]
) -> None:
    counts = sorted({run["videos"] for run in results})
    found = {count: of_setting(results, panel, count, steps).get(method) for count in counts}
    points = [(n, statistics.mean(run["test"][metric] for run in runs)) for n, runs in found.items() if runs]
    axis.plot(*zip(*points, strict=True), marker="o", **style)
