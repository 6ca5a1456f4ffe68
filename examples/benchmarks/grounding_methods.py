"""Methods compared on the embedded task of `finetune_video.py`: test mAP, mean and standard deviation over seeds.

    python examples/benchmarks/grounding_methods.py

Runs that script once per method and seed, with the same data, steps and learning rate (3e-3; the head alone 1e-2), and
prints the table of `README.md` here. A seed changes the initialisation and the order of the training videos.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm


SCRIPT = Path(__file__).parents[1] / "finetune_video.py"
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "head alone": ("head", {}),
    "bottleneck adapter (READ, cell='none')": ("read", {"cell": "none"}),
    "LoRA, q and v, r = 8": ("lora", {}),
    "LoRA, all linear, r = 2": ("lora", {"target_modules": "all-linear", "r": 2, "lora_alpha": 4}),
    "READ, the paper's tanh RNN": ("read", {"cell": "rnn"}),
    "READ, GRU": ("read", {"cell": "gru"}),
}


def main() -> None:
    """Run all methods and seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--output", type=Path, default=Path("runs/grounding_methods"), help="folder for the results")
    args = parser.parse_args()
    print("| method | trained weights | test mAP | hit@1 |\n|---|---|---|---|")
    for number, (label, (method, fields)) in enumerate(METHODS.items()):
        runs = []
        for seed in tqdm(range(args.seeds), desc=label, leave=False):
            output = args.output / f"{number}-{seed}"
            command = [sys.executable, str(SCRIPT), "--method", method, "--method-config", json.dumps(fields)]
            command += ["--seed", str(seed), "--steps", str(args.steps), "--output", str(output)]
            subprocess.run(command, check=True, capture_output=True)
            runs.append(json.loads((output / "results.json").read_text(encoding="utf-8"))[method])
        scores = {name: [run["test"][name] for run in runs] for name in ("mAP", "hit@1")}
        spread = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in scores.items()}
        cells = [f"{statistics.mean(values):.1f} ± {spread[name]:.1f}" for name, values in scores.items()]
        print(f"| {label} | {runs[0]['trainable weights']:,} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
