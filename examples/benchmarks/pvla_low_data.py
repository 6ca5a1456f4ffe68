"""Does PVLA help where few videos are all there is to learn which frames a word means? READ with and without it.

    python examples/benchmarks/pvla_low_data.py

The favourable case: a text encoder as it comes, which has never seen a frame, and plain queries ("the five": all its
moments), so that matching words and frames is the task itself; 25 and 50 of the videos that `finetune_video.py` makes.
PVLA on the outputs of all adapted blocks, its gradient 5 % of the task's. A seed chooses the training videos, the
initialisation and their order; the differences are paired by seed. Prints the table of `pvla.md`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import AutoTokenizer


EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from common.training import train  # noqa: E402
from finetune_video import FEATURE_NOISE, LEARNING_RATE, adapt, load_base  # noqa: E402
from video_grounding import ordered_digits  # noqa: E402
from video_grounding.annotations import read_annotations  # noqa: E402
from video_grounding.features import Collator, FrameEncoder, make_examples  # noqa: E402
from video_grounding.training import Examples, grounding_metrics, predict  # noqa: E402


PVLA = {"pvla_gradient_share": 0.05, "pvla_states": "all_blocks"}


def main() -> None:
    """Run all sizes and seeds, with and without PVLA, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, nargs="+", default=[25, 50], help="numbers of training videos")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="made once")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    data, base = args.cache / "plain_videos", args.cache / "base"
    ordered_digits.make_dataset(data, plain=True)
    ordered_digits.make_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base / "untuned")
    encode, annotations = FrameEncoder(base / "frame_encoder"), read_annotations(data)
    examples = {
        split: make_examples([a for a in annotations if a.split == split], encode, tokenizer, 1.0)
        for split in ("train", "test")
    }
    feature_size = examples["test"][0]["frame_features"].shape[-1]
    rows = ["| training videos | READ | READ + PVLA | difference | by seed |", "|---|---|---|---|---|"]
    for count in args.videos:
        scores: dict[bool, list[float]] = {False: [], True: []}
        for seed in range(args.seeds):
            few = random.Random(seed).sample(examples["train"], count)
            for pvla in (False, True):
                model = adapt(load_base(str(base / "untuned"), feature_size), "read", None, seed)
                collate = Collator(tokenizer, FEATURE_NOISE, few)
                options = PVLA if pvla else None
                trainer = train(
                    model, few, collate, steps=args.steps, learning_rate=LEARNING_RATE, seed=seed, pvla=options
                )
                trainer.data_collator = Collator(tokenizer)
                scores[pvla].append(test_map(trainer, examples["test"]))
        differences = [b - a for a, b in zip(scores[False], scores[True], strict=True)]
        cells = [mean_and_spread(values) for values in (scores[False], scores[True])]
        by_seed = ", ".join(f"{difference:+.1f}" for difference in differences)
        rows.append(f"| {count} | {cells[0]} | {cells[1]} | {mean_and_spread(differences, '+')} | {by_seed} |")
    print("\n".join(rows))


def test_map(trainer: transformers.Trainer, examples: Examples) -> float:
    """Mean average precision on the test videos, in per cent."""
    return grounding_metrics(predict(trainer, examples), examples)["mAP"]


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """`mean ± standard deviation`, as text."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.1f} ± {spread:.1f}"


if __name__ == "__main__":
    main()
