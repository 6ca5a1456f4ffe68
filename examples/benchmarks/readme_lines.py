"""What pages say was measured, from the results: the README's lines, the tables of the comparison and of PVLA.

    python examples/benchmarks/readme_lines.py

Writes the pages, between their marks; a test keeps them true.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from alignment_study.results import Results  # noqa: E402
from alignment_study.results import table as alignment_table  # noqa: E402
from alignment_study.rows import CELLS  # noqa: E402
from comparison.methods import METHODS  # noqa: E402
from comparison.report import mean_and_spread, of_setting  # noqa: E402
from low_resource_comparison import tables  # noqa: E402
from remade_bases import table as bases_table  # noqa: E402


RESULTS, BENCHMARKS = EXAMPLES / "results", EXAMPLES / "benchmarks"
TASKS = {
    "positions": "Moments, base with positions",
    "set": "Moments, base that sees frames as a set",
    "summaries": "Summaries in order, small T5",
}


def pages() -> dict[Path, str]:
    """Each page as the results make it."""
    bases = json.loads((RESULTS / "remade_bases.json").read_text(encoding="utf-8"))
    results = json.loads((RESULTS / "low_resource.json").read_text(encoding="utf-8"))
    study = Results(BENCHMARKS / "pvla_pairs.json")
    lines = [_first_example(bases), *(_panel(results, *told) for told in _told(results).items()), _limits(results)]
    measured = f"{_made_on(bases)}\n\n{bases_table(bases['runs'])}\n\n{_made_on(results)}\n\n{tables(results)}"
    front, tables_page, pvla = EXAMPLES.parent / "README.md", RESULTS / "README.md", BENCHMARKS / "pvla.md"
    made = {front: {"measured": "\n".join(lines)}, tables_page: {"measured": measured}}
    made[pvla] = {f"{task} {labels}": alignment_table(study, task, labels) for task, labels in CELLS}
    return {page: _fill(page.read_text(encoding="utf-8"), parts) for page, parts in made.items()}


def _told(results: dict[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """By panel, the settings with the first one's videos of which enough was run: READ with both cells, and a peer."""
    ours, videos = {"read-gru", "read-rnn"}, results["settings"][0][0]
    settings = sorted((count, steps) for count, steps in results["settings"] if count == videos)
    told = {}
    for panel in filter(results["panels"].__contains__, TASKS):
        methods = {setting: _means(results, panel, setting)[1].keys() for setting in settings}
        told[panel] = [setting for setting, some in methods.items() if ours <= some and any(map(_is_peer, some))]
    return {panel: some for panel, some in told.items() if some}


def _is_peer(method: str) -> bool:
    return not method.startswith("read-")


def _fill(page: str, parts: dict[str, str]) -> str:
    """Put each text between the marks of its name."""
    for name, text in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"The page needs the marks {start} and {end}.")
        page = f"{before}{start}\n{text}\n{end}{after}"
    return page


def _made_on(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"`{results['command']}`, on {machine['cpu']}, {machine['cores']} cores; {versions}:"


def _first_example(bases: dict[str, Any]) -> str:
    runs = bases["runs"]
    parts = []
    for threads in sorted({run["threads"] for run in runs}):
        maps = [run["read"]["mAP"] for run in runs if run["threads"] == threads]
        name = "one thread" if threads == 1 else f"{threads} threads"
        parts.append(f"{statistics.median(maps):.1f} on {name} ({len(maps)} bases, lowest {min(maps):.1f})")
    heads = statistics.median(run["head"]["mAP"] for run in runs)
    return (
        f"- The first command above, all made anew: READ's median test mAP {', '.join(parts)}; head alone {heads:.1f}."
    )


def _panel(results: dict[str, Any], panel: str, settings: list[tuple[int, int]]) -> str:
    metric, parts = results["panels"][panel]["metrics"][0], []
    for setting in settings:
        runs, means = _means(results, panel, setting)
        told = {method: mean_and_spread([run["test"][metric] for run in some]) for method, some in runs.items()}
        best = _best_peer(means)
        ours = f"READ with a GRU {told['read-gru']}, the paper's tanh RNN {told['read-rnn']}"
        if "read-pvla" in told:
            ours += f", GRU and PVLA {told['read-pvla']}"
        parts.append(f"after {setting[1]} steps {ours}, best peer {told[best]} ({METHODS[best].label})")
    bases = len(runs["read-gru"])
    task = f"{TASKS[panel]} (test {metric}, {bases} base{'s' * (bases > 1)}, {settings[0][0]} videos)"
    oracle = statistics.mean(results["panels"][panel]["oracle"])
    return f"- {task}: {'; '.join(parts)}; without order {oracle:.1f}."


def _limits(results: dict[str, Any]) -> str:
    """Where READ is behind a peer, and what nothing of this shows."""
    behind = []
    for panel, settings in _told(results).items():
        for setting in settings:
            means = _means(results, panel, setting)[1]
            if means[_best_peer(means)] > means["read-gru"]:
                behind.append(f"{panel} after {setting[1]} steps")
    return (
        f"- READ with a GRU is behind a peer in: {', '.join(behind) or 'none of these'}. Videos are synthetic, bases "
        "small; none of the paper's own results is rerun: [tables, picture, limits](examples/results/README.md)."
    )


def _means(
    results: dict[str, Any], panel: str, setting: tuple[int, int]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """By method, the runs of a setting, and their mean test score."""
    metric = results["panels"][panel]["metrics"][0]
    runs = of_setting(results["runs"], panel, *setting)
    return runs, {method: statistics.mean(run["test"][metric] for run in some) for method, some in runs.items()}


def _best_peer(means: dict[str, float]) -> str:
    return max(filter(_is_peer, means), key=means.__getitem__)


def main() -> None:
    """Write the pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
