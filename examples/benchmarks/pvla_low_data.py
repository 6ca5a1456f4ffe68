"""Does PVLA help where few videos are all there is to learn which frames a word means? READ with and without it.

    python examples/benchmarks/pvla_low_data.py

The favourable case: a text encoder as it comes, which has never seen a frame, and plain queries ("the five": all its
moments), so that matching words and frames is the task itself; 25 and 50 of the videos that `finetune_video.py` makes.
PVLA on the outputs of all adapted blocks, its gradient 5 % of the task's. A seed chooses the training videos, the
initialisation and their order; the differences are paired by seed. Prints the table of the README.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from common.annotations import ANNOTATIONS  # noqa: E402
from video_grounding import ordered_digits  # noqa: E402


WITH_PVLA = ("--pvla-gradient-share", "0.05", "--pvla-states", "all_blocks")


def main() -> None:
    """Run all sizes and seeds, with and without PVLA, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, nargs="+", default=[25, 50], help="numbers of training videos")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--output", type=Path, default=Path("runs/pvla_low_data"), help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="made once")
    args = parser.parse_args()
    ordered_digits.make_dataset(args.cache / "plain_videos", plain=True)
    ordered_digits.make_base(args.cache / "base")
    print("| training videos | READ | READ + PVLA | difference | by seed |\n|---|---|---|---|---|")
    for count in args.videos:
        scores: dict[bool, list[float]] = {False: [], True: []}
        for seed in range(args.seeds):
            data = few_videos(args.cache / "plain_videos", args.output / f"{count}-{seed}" / "data", count, seed)
            for pvla in (False, True):
                scores[pvla].append(run(args, data, args.output / f"{count}-{seed}" / f"pvla-{pvla}", seed, pvla))
        differences = [b - a for a, b in zip(scores[False], scores[True], strict=True)]
        cells = [mean_and_spread(values) for values in (scores[False], scores[True])]
        by_seed = ", ".join(f"{difference:+.1f}" for difference in differences)
        print(f"| {count} | {cells[0]} | {cells[1]} | {mean_and_spread(differences, '+')} | {by_seed} |", flush=True)


def few_videos(source: Path, folder: Path, count: int, seed: int) -> Path:
    """A data folder with some of the training videos of another, and all of the rest."""
    lines = [json.loads(line) for line in (source / ANNOTATIONS).read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    kept = random.Random(seed).sample(train, count) + [line for line in lines if line["split"] != "train"]
    for line in kept:
        line["video"] = str((source / line["video"]).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANNOTATIONS).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return folder


def run(args: argparse.Namespace, data: Path, output: Path, seed: int, pvla: bool) -> float:
    """Test mAP of one training."""
    base = args.cache / "base"
    command = [sys.executable, str(EXAMPLES / "finetune_video.py"), "--data", str(data), "--output", str(output)]
    command += ["--model", str(base / "untuned"), "--frame-encoder", str(base / "frame_encoder")]
    command += ["--steps", str(args.steps), "--seed", str(seed), *(WITH_PVLA if pvla else ())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))["read"]["test"]["mAP"]


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.1f} ± {spread:.1f}"


if __name__ == "__main__":
    main()
