"""How much of a training step of `finetune_video.py` PVLA takes, in each of its forms.

    python examples/benchmarks/pvla_step_time.py

The example's model with random weights and random data, batch 8, 24 frames, queries of 3 words. Trainers with and
without PVLA take turns step by step, so that a machine that gets slower or faster does so for all. Prints a table of
`README.md` here: the median, over rounds of 100 steps, of the ratio to the processor time without PVLA. With
`--negatives`, instead, what the loss alone takes with and without the negatives of a batch, forward and backward, of
24 frames and 12 words each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from peft import get_peft_model
from tqdm import tqdm
from transformers import BertConfig, TrainerCallback, logging, set_seed


sys.path.insert(0, str(Path(__file__).parents[1]))

from video_grounding.modeling import GroundingConfig, GroundingModel

from peft_read import PvlaLoss, PvlaTrainer, PvlaTrainingArguments, ReadConfig


BATCH, WORDS, FRAMES = 8, 3, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "without PVLA": {"pvla_weight": 0.0},
    "last block": {"pvla_states": "last_block"},
    "all blocks": {"pvla_states": "all_blocks"},
    "inputs": {"pvla_states": "inputs"},
    "inputs, negatives of the batch": {"pvla_states": "inputs", "pvla_negatives": True},
    "last block, health every 100 steps": {"pvla_states": "last_block", "pvla_health_steps": 100},
    "last block, weight by gradient share": {"pvla_states": "last_block", "pvla_gradient_share": 0.05},
}


def main() -> None:
    """Time all variants in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one step that warms up")
    parser.add_argument("--steps", type=int, default=100, help="steps of each variant in a round")
    parser.add_argument("--negatives", action="store_true", help="time the loss alone, by size of the batch")
    args = parser.parse_args()
    if args.negatives:
        time_negatives(args.rounds)
        return
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    steps = 1 + args.rounds * args.steps
    runs = {name: greenlet(make_trainer(options, steps).train) for name, options in VARIANTS.items()}
    for run in runs.values():
        run.switch()
    seconds = {name: [0.0] * args.rounds for name in runs}
    for i in tqdm(range(steps - 1), leave=False):
        for name, run in runs.items():
            start = time.process_time()
            run.switch()
            seconds[name][i // args.steps] += time.process_time() - start
    base = seconds["without PVLA"]
    print(f"One step without PVLA: {1e3 * statistics.median(base) / args.steps:.0f} ms\n")
    print("| alignment | step time | spread |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = sorted(value / other for value, other in zip(values, base, strict=True))
        print(f"| {name} | {statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |")


class TakeTurns(TrainerCallback):
    """Hands over after every step."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Go on where this Trainer was called for a step."""
        getcurrent().parent.switch()


def make_trainer(options: dict[str, Any], steps: int) -> PvlaTrainer:
    """A Trainer of the example's model for so many steps."""
    set_seed(0)
    text = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = GroundingModel(GroundingConfig(text, feature_size=64, sep_token_id=3))
    model = get_peft_model(model, ReadConfig(r=16, cell="gru", modules_to_save=["saliency_head", "frame_projection"]))
    arguments = PvlaTrainingArguments(
        output_dir="runs/pvla_step_time",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        **({"pvla_health_steps": 0} | options),
    )
    return PvlaTrainer(model, arguments, train_dataset=random_examples(), callbacks=[TakeTurns()])


def time_negatives(rounds: int) -> None:
    """Milliseconds of the loss and its gradient, without and with negatives, and the pairs that there are."""
    torch.set_num_threads(1)
    print("| batch | pairs | without negatives | with them | kept for the gradient |\n|---|---|---|---|---|")
    for batch in (8, 32, 64):
        states = [torch.randn(batch, points, 384, requires_grad=True) for points in (24, 12)]
        taken = {}
        for negatives in (False, True):
            loss, seconds = PvlaLoss(negatives=negatives), []
            for _ in range(rounds + 1):
                start = time.process_time()
                torch.autograd.grad(loss(*states), states)
                seconds.append(time.process_time() - start)
            taken[negatives] = f"{1e3 * statistics.median(seconds[1:]):.1f} ms"  # the first warms up
        kept = kept_bytes(loss, states) / 2**20
        print(f"| {batch} | {batch**2} | {taken[False]} | {taken[True]} | {kept:.1f} MiB |", flush=True)


def kept_bytes(loss: PvlaLoss, states: list[torch.Tensor]) -> int:
    """Of the tensors that autograd saves."""
    sizes = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss(*states)
    return sum(sizes.values())


def random_examples() -> list[dict[str, torch.Tensor]]:
    """One batch of examples in the shapes of `finetune_video.py`'s."""
    length = WORDS + 2 + FRAMES + 1
    position = torch.arange(length)
    return [
        {
            "input_ids": torch.randint(5, 1000, (WORDS + 2,)),
            "attention_mask": torch.ones(WORDS + 2, dtype=torch.long),
            "frame_features": torch.randn(FRAMES, 64),
            "frame_mask": torch.ones(FRAMES, dtype=torch.bool),
            "labels": torch.randint(2, (FRAMES,)).float(),
            "video_token_mask": (position >= WORDS + 2) & (position < length - 1),
            "text_token_mask": (position >= 1) & (position <= WORDS),
        }
        for _ in range(8 * BATCH)
    ]


if __name__ == "__main__":
    main()
