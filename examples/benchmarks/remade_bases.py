"""`finetune_video.py` from nothing, several times: how far its result depends on what is made anew on each machine.

    python examples/benchmarks/remade_bases.py

A seed makes everything anew: videos, frame encoder, base and adapter. For each seed and number of threads the example
runs in a process of its own. Goes on where it was cut; prints a table, and the lowest and the middle result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from common.machine import describe_machine  # noqa: E402


SCRIPT = EXAMPLES / "finetune_video.py"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of all that is made")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--work", type=Path, default=Path("runs/remade_bases"), help="folder for what is made")
    parser.add_argument("--results", type=Path, default=EXAMPLES / "results" / "remade_bases.json", help="the results")
    args = parser.parse_args()
    results: dict[str, Any] = {"command": "", "machine": describe_machine(), "runs": []}
    if args.results.is_file():
        results = json.loads(args.results.read_text(encoding="utf-8"))
    runs = results["runs"]
    for threads in args.threads:
        for seed in args.seeds:
            if not any((run["seed"], run["threads"]) == (seed, threads) for run in runs):
                runs.append({"seed": seed, "threads": threads} | run_example(args.work, seed, threads))
                results["command"] = command(runs)
                args.results.parent.mkdir(parents=True, exist_ok=True)
                args.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
                print(runs[-1], flush=True)
    print(table(runs))


def command(runs: Sequence[dict[str, Any]]) -> str:
    """The command that makes these results."""
    seeds, threads = (
        " ".join(str(each) for each in sorted({run[key] for run in runs})) for key in ("seed", "threads")
    )
    return f"python examples/benchmarks/remade_bases.py --seeds {seeds} --threads {threads}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """What each number of threads gave, as markdown."""
    lines = ["| threads | bases | READ, test mAP: median (lowest) | by base | head alone | CPU seconds in all |"]
    lines.append("|---|---|---|---|---|---|")
    for threads in sorted({run["threads"] for run in runs}):
        some = [run for run in runs if run["threads"] == threads]
        maps, heads = [run["read"]["mAP"] for run in some], [run["head"]["mAP"] for run in some]
        by_base = ", ".join(f"{value:.1f}" for value in maps)
        cells = [f"{statistics.median(maps):.1f} ({min(maps):.1f})", by_base, f"{statistics.median(heads):.1f}"]
        timed = [run["cpu_seconds"] for run in some if "cpu_seconds" in run]
        cells.append(f"{statistics.median(timed):.0f}" if timed else "-")
        lines.append(f"| {threads} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_example(work: Path, seed: int, threads: int) -> dict[str, object]:
    """The example from nothing in a new process: its results, and how long it took."""
    folder = work / f"{seed}-{threads}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, str(SCRIPT), "--seed", str(seed)]
    command += ["--cache", str(folder / "made"), "--output", str(folder / "out")]
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    scores = {method: result["test"] for method, result in results.items()}
    return scores | {"cpu_seconds": round(used), "seconds": round(time.perf_counter() - start)}


if __name__ == "__main__":
    main()
