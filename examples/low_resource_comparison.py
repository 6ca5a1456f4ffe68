"""READ and its peers where data is scarce: one protocol, every method with a learning rate of its own.

    python examples/low_resource_comparison.py

Three panels, which are never mixed: finding a moment ("the second five") with a base that has positions (`positions`),
and with one that sees frames as a set (`set`); writing ordered summaries (`summaries`). For each seed everything is
made anew: videos, frame encoder, base, adapter. A method's learning rate is the best of one grid on validation videos.
Prints how much there is to do before it starts, runs on all cores, and goes on where it was cut; the first settings
are the most telling.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common.machine import describe_machine
from comparison.cells import (
    GRID_SEED,
    GRID_STEPS,
    GRID_VIDEOS,
    RATES,
    Cell,
    Store,
    Task,
    chosen_rates,
    finals,
    grid,
    peak_memory,
    quiet,
    run,
)
from comparison.grounding import GroundingTask
from comparison.methods import METHODS
from comparison.report import draw, table, table_by_videos
from comparison.summaries import SummaryTask


PANELS = ("positions", "set", "summaries")
SEEDS = (0, 1, 2, 3, 4)
SETTINGS = (
    (100, 200),
    (100, 400),
    (25, 200),
    (400, 400),
    (50, 200),
    (200, 400),
    (25, 400),
    (400, 200),
    (50, 400),
    (200, 200),
)
USUAL_SECONDS = 0.06  # of a step with its share of the scoring, before anything is measured


def main() -> None:
    """Run what is missing, and write results, tables and the picture."""
    args = parse_arguments()
    deadline = time.time() + 3600 * args.hours
    print_budget(args)
    os.environ["TQDM_DISABLE"] = "1"  # for the processes
    store = Store(args.work / "cells")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=quiet) as pool:
        for panel in args.panels:
            wait(pool, [(make, (panel, seed, args.work)) for seed in sorted({GRID_SEED, *args.seeds})], deadline)
            methods, metric = methods_of(panel, args.methods), make_task(panel, args.work).metric
            while (missing := grid(store, panel, methods, metric)) and time.time() < deadline:
                wait(pool, [(run_and_store, (cell, args.work)) for cell in missing], deadline)
        # A setting of all panels before the next setting of any.
        cells: list[Cell] = []
        for setting in args.settings:
            for panel in args.panels:
                rates = chosen_rates(store, panel, methods_of(panel, args.methods), make_task(panel, args.work).metric)
                cells += finals(panel, rates, [setting], args.seeds)
        wait(pool, [(run_and_store, (cell, args.work)) for cell in cells if cell not in store], deadline)
    measure_memory(args, deadline)
    results = collect(args, store)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=None, separators=(",", ":")), encoding="utf-8")
    print(tables(results))
    panels = [
        panel for panel in args.panels if any(each["panel"] == panel and each["chosen"] for each in results["runs"])
    ]
    if panels:
        metrics = {panel: results["panels"][panel]["metrics"][0] for panel in panels}
        draw(args.results.with_suffix(".png"), results["runs"], panels, metrics, *args.settings[0])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), help="tasks to run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="each with a base of its own")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=list(SETTINGS),
        help="training videos x steps, such as 100x200, in the order in which they run",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start nothing new after that long")
    parser.add_argument("--work", type=Path, default=Path("runs/low_resource"), help="folder for what is made")
    default = Path(__file__).parent / "results" / "low_resource.json"
    parser.add_argument("--results", type=Path, default=default, help="the results; the picture lies beside them")
    return parser.parse_args()


def make_task(panel: str, work: Path) -> Task:
    """The task of a panel."""
    return SummaryTask(work / "made") if panel == "summaries" else GroundingTask(panel, work / "made")


def methods_of(panel: str, methods: Sequence[str]) -> list[str]:
    """Those methods that work on a panel's model."""
    return [method for method in methods if panel != "summaries" or METHODS[method].generates]


def print_budget(args: argparse.Namespace) -> None:
    """How many runs there are, how many are done, and how long the rest takes."""
    store = Store(args.work / "cells")
    cells = []
    for panel in args.panels:
        methods = methods_of(panel, args.methods)
        # The chosen rates aren't known yet: of each method and setting any rate counts, and the whole grid.
        rates = dict.fromkeys(methods, 0.0)
        cells += len(RATES) * list(finals(panel, rates, [(GRID_VIDEOS, GRID_STEPS)], [GRID_SEED]))
        cells += finals(panel, rates, args.settings, args.seeds)
    done = store.all()
    steps = sum(cell.steps for cell in cells) - sum(each["steps"] for each in done)
    seconds = statistics.median([each["seconds"] / each["steps"] for each in done] or [USUAL_SECONDS])
    hours = max(steps, 0) * seconds / 3600 / args.jobs
    print(
        f"At most {len(cells)} runs ({len(args.panels)} panels, {len(args.seeds)} bases each, 3 to {len(RATES)} rates "
        f"a method), {len(done)} done: about {hours:.1f} hours with {args.jobs} processes, and a minute a base.",
        flush=True,
    )


def wait(pool: ProcessPoolExecutor, tasks: Sequence[tuple[Any, tuple[Any, ...]]], deadline: float) -> None:
    """Run functions in a pool; what hasn't begun at the deadline is left out."""
    futures = [pool.submit(_unless_late, deadline, function, arguments) for function, arguments in tasks]
    for number, future in enumerate(futures, start=1):
        try:
            begun = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if not begun:
            print(f"The time is up: {len(futures) - number + 1} of {len(futures)} are left out.", flush=True)
            break
        print(f"{number} of {len(futures)}: {tasks[number - 1][1][0]}", flush=True)


def _unless_late(deadline: float, function: Any, arguments: tuple[Any, ...]) -> bool:
    """Call a function, unless the deadline is past; says whether it did."""
    if time.time() > deadline:
        return False
    function(*arguments)
    return True


def make(panel: str, seed: int, work: Path) -> None:
    """Make what a panel needs for a seed."""
    make_task(panel, work).make(seed)


def run_and_store(cell: Cell, work: Path) -> None:
    """Run a cell and keep its result."""
    start = time.time()
    with tempfile.TemporaryDirectory() as output:
        result = run(make_task(cell.panel, work), cell, Path(output))
    Store(work / "cells").write(cell, result | {"seconds": round(time.time() - start, 1)})


def measure_memory(args: argparse.Namespace, deadline: float) -> None:
    """Peak memory of each method, each in a process of its own."""
    path = args.work / "memory.json"
    memory = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    store = Store(args.work / "cells")
    for panel in args.panels:
        task = make_task(panel, args.work)
        for method, rate in chosen_rates(store, panel, methods_of(panel, args.methods), task.metric).items():
            if method in memory.setdefault(panel, {}) or time.time() > deadline:
                continue
            context = multiprocessing.get_context("spawn")
            with (
                tempfile.TemporaryDirectory() as output,
                ProcessPoolExecutor(1, mp_context=context, initializer=quiet) as pool,
            ):
                cell = Cell(panel, method, 100, 200, args.seeds[0], rate)
                memory[panel][method] = round(pool.submit(peak_memory, task, cell, Path(output)).result())
            path.write_text(json.dumps(memory), encoding="utf-8")


def collect(args: argparse.Namespace, store: Store) -> dict[str, Any]:
    """All that the tables are made of."""
    runs, panels = [run for run in store.all() if run["panel"] in args.panels], {}
    memory = args.work / "memory.json"
    for panel in args.panels:
        task = make_task(panel, args.work)
        rates = chosen_rates(store, panel, methods_of(panel, args.methods), task.metric)
        for each in runs:
            if each["panel"] == panel:
                each["chosen"] = each["rate"] == rates.get(each["method"])
        there = [seed for seed in args.seeds if any(r["panel"] == panel and r["seed"] == seed for r in runs)]
        oracle = [task.oracle(seed) for seed in there]
        panels[panel] = {"metrics": [task.metric, task.second_metric], "oracle": oracle}
    runs = [_told(run, panels[run["panel"]]["metrics"], args.settings[0]) for run in runs]
    return {
        "command": command(args),
        "machine": describe_machine(),
        "settings": args.settings,
        "panels": panels,
        "memory": json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {},
        "runs": runs,
    }


def _told(run: dict[str, Any], metrics: Sequence[str], drawn: tuple[int, int]) -> dict[str, Any]:
    """What tables and picture tell of a run; the rest, such as its training losses, stays in the work folder."""
    left_out = {"losses", "seconds"} | ({"validation_curve"} if (run["videos"], run["steps"]) != drawn else set())
    scores = {"validation": {metrics[0]: run["validation"][metrics[0]]}, "test": {m: run["test"][m] for m in metrics}}
    return {name: value for name, value in run.items() if name not in left_out} | scores


def command(args: argparse.Namespace) -> str:
    """The command that makes these results, without its folders."""
    options = {"panels": PANELS, "methods": tuple(METHODS), "seeds": SEEDS}
    chosen = {name: getattr(args, name) for name, usual in options.items() if tuple(getattr(args, name)) != usual}
    if args.settings != list(SETTINGS):
        chosen["settings"] = [f"{videos}x{steps}" for videos, steps in args.settings]
    parts = [f"--{name} {' '.join(map(str, values))}" for name, values in chosen.items()]
    return " ".join(["python examples/low_resource_comparison.py", *parts])


def tables(results: dict[str, Any]) -> str:
    """Of each panel, the first setting with all that was measured, then the scores by training videos; as markdown."""
    parts, runs = [], results["runs"]
    settings = [tuple(setting) for setting in results["settings"]]
    videos, steps = settings[0]
    for panel, known in results["panels"].items():
        oracle, metrics = known["oracle"], known["metrics"]
        if not any(run["panel"] == panel and run["chosen"] for run in runs):
            continue
        parts.append(f"{panel}: who doesn't see the order scores {statistics.mean(oracle):.1f} {metrics[0]}.")
        rows = table(runs, panel, videos, steps, metrics, results["memory"].get(panel, {}))
        if rows.count("\n") > 1:
            parts.append(f"{panel}, {videos} training videos, {steps} steps:\n\n{rows}")
        for length in sorted({length for _, length in settings} if len(settings) > 1 else ()):
            counts = sorted(count for count, its_length in settings if its_length == length)
            rows = table_by_videos(runs, panel, counts, length, metrics[0])
            parts.append(f"{panel}, {metrics[0]} after {length} steps, by training videos:\n\n{rows}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
