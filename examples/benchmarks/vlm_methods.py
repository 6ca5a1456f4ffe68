"""Methods compared on the embedded task of `finetune_vlm.py`, READ, LoRA and the plain bottleneck adapter.

    python examples/benchmarks/vlm_methods.py

Each method's learning rate is the one that does best on 100 validation videos, with the first seed. With it, 300 steps
of 8 on 200 videos for each of several seeds, which change the initialisation and the order of the training videos, and
the scores on 400 test videos that no choice was made by. Prints the table of `examples/vlm.md`. Runs that were made
are kept in the output folder and not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from finetune_vlm import make_embedded, make_trainer
from transformers.utils import logging
from vlm.collator import VlmCollator
from vlm.data import read_samples
from vlm.digits import make_dataset, parse_marks
from vlm.metrics import score
from vlm.modeling import adapt_model, load_model, load_processor
from vlm.options import parse_options


RATES = (3e-3, 1e-2)
QUERIES = r".*text_model.*(q_proj|v_proj)"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "READ, GRU, r = 16": ("read", {"r": 16, "cell": "gru"}),
    "LoRA, q and v, r = 15": ("lora", {"r": 15, "lora_alpha": 30, "target_modules": QUERIES}),
    "bottleneck adapter (READ, cell='none'), r = 28": ("read", {"r": 28, "cell": "none"}),
    "LoRA, all linear, r = 4": ("lora", {"r": 4, "lora_alpha": 8}),
    "READ, the paper's tanh RNN, r = 16": ("read", {"r": 16, "cell": "rnn"}),
}


def main() -> None:
    """Choose the rates, run all methods and seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/peft_read/vlm"), help="where data and base are")
    parser.add_argument("--output", type=Path, default=Path("runs/vlm_methods"), help="folder for the results")
    args = parser.parse_args()
    logging.set_verbosity_error()
    study = Study(args.cache.expanduser(), args.steps, args.output)
    print(f"base, zero-shot: {study.zero_shot()}", flush=True)
    print("| method | rate | trained weights | test mIoU | R1@0.5 | R1@0.7 |\n|---|---|---|---|---|---|")
    for label, (method, fields) in METHODS.items():
        by_rate = {rate: study.run(method, fields, rate, 0)["validation"]["mIoU"] for rate in RATES}
        print(f"<!-- {label}: validation mIoU {by_rate} -->", flush=True)
        rate = max(by_rate, key=lambda one: by_rate[one])
        runs = [study.run(method, fields, rate, seed) for seed in range(args.seeds)]
        cells = []
        for name in ("mIoU", "R1@0.5", "R1@0.7"):
            values = [run["test"][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        print(f"| {label} | {rate:g} | {runs[0]['weights']:,} | {' | '.join(cells)} |", flush=True)


class Study:
    """Data, base, and runs that aren't made twice.

    Args:
        cache: where the embedded default is kept.
        steps: of training.
        output: folder for what came out.
    """

    def __init__(self, cache: Path, steps: int, output: Path) -> None:
        self.model, self.steps, self.output = cache / "model", steps, output
        make_embedded(cache / "videos", self.model)
        make_dataset(cache / "study", {"train": 200, "validation": 100, "test": 400}, seed=500)
        samples = read_samples(cache / "study")
        self.samples = {split: [s for s in samples if s.split == split] for split in ("train", "validation", "test")}
        self.collator = VlmCollator(load_processor(str(self.model)), fps=1.0, max_frames=12)
        self.output.mkdir(parents=True, exist_ok=True)

    def zero_shot(self) -> dict[str, float]:
        """Test scores of the base."""
        return self._scores(self._trainer(load_model(str(self.model)), 0.0, 0), "test")

    def run(self, method: str, fields: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
        """Scores of a trained adapter on validation and test videos, and how many weights it has."""
        told = json.dumps({"method": method, **fields, "rate": rate, "seed": seed, "steps": self.steps})
        known = self.output / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        if not known.is_file():
            adapted = adapt_model(load_model(str(self.model)), method, fields, "language", frames=12, seed=seed)
            trainer = self._trainer(adapted, rate, seed)
            trainer.train()
            weights = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
            scores = {split: self._scores(trainer, split) for split in ("validation", "test")}
            known.write_text(json.dumps({"run": json.loads(told), "weights": weights, **scores}), encoding="utf-8")
        return json.loads(known.read_text(encoding="utf-8"))

    def _trainer(self, model: Any, rate: float, seed: int) -> Any:
        given = ["--learning_rate", str(rate), "--seed", str(seed), "--max_steps", str(self.steps)]
        given += ["--disable_tqdm", "True", "--logging_strategy", "no"]
        options, training = parse_options([*given, "--output_dir", str(self.output)])
        return make_trainer(options, training, model, self.collator, self.samples)

    def _scores(self, trainer: Any, split: str) -> dict[str, float]:
        samples = self.samples[split]
        return score(trainer.answers(samples), samples, "grounding", parse_marks)


if __name__ == "__main__":
    main()
