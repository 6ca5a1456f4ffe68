"""Methods compared on the clips of `trimodal_question_answering.py`: test F1, mean and standard deviation over seeds.

    python examples/benchmarks/trimodal_methods.py
    python examples/benchmarks/trimodal_methods.py --clips long
    python examples/benchmarks/trimodal_methods.py --clips two_digits

Runs that script once per seed, each in a process of its own, and prints the tables of `README.md` here. A seed changes
the training and validation clips, the initialisation and the order; towers and test clips are always the same. Seeds
that have been run are read from the output folder, not run again. Long clips take hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


SCRIPT = Path(__file__).parents[1] / "trimodal_question_answering.py"
METHODS = {
    "lstta": "LSTTA, window 1",
    "no-filter": "same, no filter",
    "window-4": "LSTTA, window 4",
    "window-4-no-filter": "same, no filter",
    "one-level": "LSTTA, window 1, after the last blocks only",
    "vision+sound": "LSTTA, pictures and sound",
    "vision+text": "LSTTA, pictures and text",
    "sound+text": "LSTTA, sound and text",
    "shuffled-sound": "LSTTA, the frames' sounds in another order",
    "late-mlp": "late fusion: MLP on each frame's picture and sound, and text",
    "late-mlp-window-4": "late fusion: same, the sound's mean over four frames",
    "late-mlp-pooled-sound": "late fusion: same, the sound's mean over the clip",
    "late-attention": "late fusion: attention over all pictures, sounds and words",
}
# What lacks a modality, or has to learn from few clips what sounds when.
BEATEN = ("vision+sound", "vision+text", "sound+text", "late-attention")
# By kind of clips, training steps and the methods that are trained for so many; a step of late fusion costs little.
RUNS: dict[str, dict[int, list[str]]] = {
    "short": {150: [name for name in METHODS if name not in ("window-4-no-filter", "late-mlp-window-4")]},
    "long": {
        300: ["lstta", "no-filter", "window-4", "window-4-no-filter"],
        1500: ["late-mlp", "late-mlp-window-4", "late-attention"],
    },
    "two_digits": {300: ["lstta", "one-level", "vision+sound"], 1500: ["late-mlp", "late-attention"]},
}


def main() -> None:
    """Run all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", default="short", choices=RUNS, help="which clips (default: short)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--output", type=Path, default=Path("runs/trimodal_methods"), help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="made once")
    args = parser.parse_args()
    runs = [run(args, seed) for seed in tqdm(range(args.seeds), desc="seeds", leave=False)]
    print(f"{args.clips} clips, {args.seeds} seeds\n")
    print("| method | steps | trained weights | test F1 | by seed | seconds |\n|---|---|---|---|---|---|")
    for method, steps in [(method, steps) for steps, methods in RUNS[args.clips].items() for method in methods]:
        scores = [results[method]["test"] for results in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        cells = [METHODS[method], str(steps), f"{runs[0][method]['trainable weights']:,}"]
        cells += [f"{statistics.mean(scores):.1f} ± {spread:.1f}", ", ".join(f"{score:.1f}" for score in scores)]
        cells.append(f"{statistics.mean(results[method]['training seconds'] for results in runs):.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)
    if args.clips == "short":
        check_margin(runs)


def check_margin(runs: list[dict[str, Any]]) -> None:
    """Whether LSTTA does what it is shown for: better than each of `BEATEN` by more than 20 points."""
    means = {method: statistics.mean(results[method]["test"] for results in runs) for method in ("lstta", *BEATEN)}
    best = max(BEATEN, key=lambda method: means[method])
    margin = means["lstta"] - means[best]
    print(f"LSTTA is {margin:.1f} points better than {METHODS[best]}.")
    if margin <= 20:
        raise SystemExit("That is less than the 20 points that it should be.")


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The results of one seed; an interrupted run goes on with the method at which it stopped."""
    results: dict[str, Any] = {}
    for steps, methods in RUNS[args.clips].items():
        folder = args.output / f"{args.clips}_{steps}_steps_seed_{seed}"
        done = results_in(folder)
        if missing := [method for method in methods if method not in done]:
            command = [sys.executable, str(SCRIPT), "--clips", args.clips, "--methods", *missing]
            command += ["--steps", str(steps), "--seed", str(seed)]
            command += ["--output", str(folder / f"{len(done)}"), "--cache", str(args.cache)]
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.txt").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log)
        results |= results_in(folder)
    return results


def results_in(folder: Path) -> dict[str, Any]:
    """By method, the results of all runs below a folder."""
    results: dict[str, Any] = {}
    for file in sorted(folder.glob("*/results.json")):
        results |= json.loads(file.read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    main()
