"""Training with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_read import PvlaTrainer, PvlaTrainingArguments


Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def train(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    collator: Collate,
    *,
    steps: int,
    learning_rate: float,
    learning_rates: dict[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    output_dir: str = "runs",
    description: str = "train",
    pvla: dict[str, Any] | None = None,
) -> PvlaTrainer:
    """Train what is trainable in `model`, in place: AdamW, a tenth of the steps warm-up, then a cosine.

    Args:
        learning_rates: rates of modules that differ, by the end of the module's name.
        description: shown with the progress.
        pvla: options of PVLA; none by default, and the Trainer is transformers' own.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable:
        special = [rate for module, rate in (learning_rates or {}).items() if f"{module}." in name]
        groups.setdefault(special[0] if special else learning_rate, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for rate, p in groups.items()], weight_decay=0.01)
    print(
        f"{description}: {sum(p.numel() for _, p in trainable):,} weights, {steps} steps of {batch_size}", flush=True
    )
    arguments = PvlaTrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        max_grad_norm=1.0,
        logging_steps=max(steps // 4, 1),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        seed=seed,
        **({"pvla_weight": 0.0} | (pvla or {})),
    )
    trainer = PvlaTrainer(
        model,
        arguments,
        collator,
        examples,
        processing_class=getattr(collator, "tokenizer", None),
        optimizers=(optimizer, None),
    )
    trainer.train()
    return trainer
