"""What losing modalities in training is worth: one checkpoint, tested with each of them missing.

    python examples/benchmarks/trimodal_missing.py

The clips of `trimodal_filtering.py` of which half of the frames matter: sound and question tell which ones, but the
answer is also the digit that is seen most often. A model that never missed one in training needn't know that. Mean
test accuracy and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import logging, set_seed
from trimodal_filtering import INPUTS, SIZES, Features, accuracy, make_towers, model_of, sizes_of, train


DROPOUTS = (0.0, 0.3)
IRRELEVANT = 50  # per cent of the frames
MISSING = {"nothing": (), "sound": ("audio",), "the question": ("text",), "sound and question": ("audio", "text")}


def without(data: dict[str, Tensor], modalities: tuple[str, ...]) -> dict[str, Tensor]:
    """The same clips, from which modalities are masked out."""
    clips = dict(data)
    if "audio" in modalities:
        clips["audio_mask"] = torch.zeros(data[INPUTS["audio"]].shape[:2], dtype=torch.long)
    if "text" in modalities:
        clips["attention_mask"] = torch.zeros_like(data["attention_mask"])
    return clips


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: 3e-3)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="made once")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    features = {split: Features(*make_towers(args.cache), split) for split in ("train", "test")}
    scores: dict[tuple[float, str], list[float]] = {}
    for seed, dropout in tqdm([(seed, dropout) for seed in range(args.seeds) for dropout in DROPOUTS], desc="runs"):
        training = features["train"].make(SIZES["train"], IRRELEVANT, 10 * seed)
        test = features["test"].make(SIZES["test"], IRRELEVANT, 10 * seed + 2)
        set_seed(seed)
        model = model_of("mean, gate", sizes_of(training), window=8, modality_dropout=dropout)
        train(model, training, args.rate, args.steps)
        for name, modalities in MISSING.items():
            scores.setdefault((dropout, name), []).append(accuracy(model, without(test, modalities)))
    print(
        f"| `modality_dropout` | {' | '.join(f'missing: {name}' for name in MISSING)} |\n|---|{'---|' * len(MISSING)}"
    )
    for dropout in DROPOUTS:
        cells = []
        for name in MISSING:
            each = scores[dropout, name]
            cells.append(f"{statistics.mean(each):.1f} ± {statistics.stdev(each) if len(each) > 1 else 0.0:.1f}")
        print(f"| {dropout} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
