"""The README's lines about what was measured, from the results in `examples/results`, and nothing else.

    python examples/benchmarks/readme_lines.py [--print]

Writes them between the marks in `examples/results/README.md`, and in the README where that has the marks; a test keeps
both true.
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

from comparison.methods import METHODS  # noqa: E402
from comparison.report import mean_and_spread, of_setting  # noqa: E402


RESULTS = EXAMPLES / "results"
PAGES = (RESULTS / "README.md", EXAMPLES.parent / "README.md")
START, END = "<!-- measured -->", "<!-- /measured -->"
OURS = ("read-rnn", "read-gru", "read-lstm")
TASKS = {
    "positions": "Finding a moment, base with positions",
    "set": "Finding a moment, base that sees frames as a set",
    "summaries": "Writing ordered summaries, small T5",
}


def lines() -> list[str]:
    """The lines, as markdown."""
    bases = json.loads((RESULTS / "remade_bases.json").read_text(encoding="utf-8"))
    results = json.loads((RESULTS / "low_resource.json").read_text(encoding="utf-8"))
    found = [_first_example(bases)]
    found += [_panel(results, panel) for panel in TASKS if panel in results["panels"]]
    return [*found, _limits(results)]


def fill(page: str) -> str:
    """A page with the lines between its marks.

    Raises:
        ValueError: if it doesn't have both marks.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"The page needs the marks {START} and {END}.")
    return "\n".join([before + START, *lines(), END + after])


def _first_example(bases: dict[str, Any]) -> str:
    runs = bases["runs"]
    parts = []
    for threads in sorted({run["threads"] for run in runs}):
        maps = [run["read"]["mAP"] for run in runs if run["threads"] == threads]
        name = "one thread" if threads == 1 else f"{threads} threads"
        parts.append(f"{statistics.median(maps):.1f} on {name} ({len(maps)} bases, lowest {min(maps):.1f})")
    heads = statistics.median(run["head"]["mAP"] for run in runs)
    return (
        f"- The first example, everything made anew for each seed: READ's median test mAP is {' and '.join(parts)}; the "
        f"head alone has {heads:.1f}."
    )


def _panel(results: dict[str, Any], panel: str) -> str:
    metric, (videos, steps) = results["panels"][panel]["metrics"][0], results["settings"][0]
    runs = of_setting(results["runs"], panel, videos, steps)
    means = {method: statistics.mean(run["test"][metric] for run in some) for method, some in runs.items()}

    def best(methods: list[str]) -> str:
        method = max(methods, key=means.__getitem__)
        values = [run["test"][metric] for run in runs[method]]
        bases = f"{len(values)} bases" if len(values) > 1 else "1 base"
        return f"{METHODS[method].label}: {mean_and_spread(values)} ({runs[method][0]['weights']:,} weights, {bases})"

    ours, peers = [m for m in runs if m in OURS], [m for m in runs if m not in OURS]
    oracle = statistics.mean(results["panels"][panel]["oracle"])
    return (
        f"- {TASKS[panel]}, {videos} videos, {steps} steps, test {metric}: {best(ours)}; the best peer, {best(peers)}; "
        f"without order {oracle:.1f}."
    )


def _limits(results: dict[str, Any]) -> str:
    """Where the paper's own cell is behind a peer."""
    behind = []
    for panel in results["panels"]:
        metric, (videos, steps) = results["panels"][panel]["metrics"][0], results["settings"][0]
        runs = of_setting(results["runs"], panel, videos, steps)
        means = {method: statistics.mean(run["test"][metric] for run in some) for method, some in runs.items()}
        if "read-rnn" not in means:
            continue
        better = [METHODS[m].label for m in means if m not in OURS and means[m] > means["read-rnn"]]
        behind.append(f"`{panel}` {means['read-rnn']:.1f}" + (f", behind {len(better)} peers" if better else ""))
    return (
        f"- The paper's tanh RNN learns more slowly than the GRU here: {'; '.join(behind)}. Videos are synthetic, bases "
        "small; none of the paper's own results is rerun."
    )


def main() -> None:
    """Write the lines into the pages, or print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="show", help="print them, and write nothing")
    if parser.parse_args().show:
        print("\n".join(lines()))
        return
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if START in page:
            path.write_text(fill(page), encoding="utf-8")


if __name__ == "__main__":
    main()
