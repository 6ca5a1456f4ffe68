"""Training and prediction with transformers' Trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from peft_read import PvlaTrainer, PvlaTrainingArguments

from .features import Collator


Examples = list[dict[str, Any]]
INPUTS = ("input_ids", "attention_mask", "frame_features", "frame_mask")


def train(
    model: nn.Module,
    examples: Examples,
    collator: Collator,
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
        processing_class=collator.tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.train()
    return trainer


@torch.inference_mode()
def predict(model: nn.Module, examples: Examples, collator: Collator, batch_size: int = 50) -> list[np.ndarray]:
    """The saliency of every clip of every example, logits `(clips,)` each."""
    model.eval()
    device = next(model.parameters()).device
    saliency = []
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        logits = model(**{name: batch[name].to(device) for name in INPUTS}).logits
        saliency += [row[mask].numpy() for row, mask in zip(logits.cpu(), batch["frame_mask"], strict=True)]
    return saliency


def grounding_metrics(saliency: list[np.ndarray], examples: Examples) -> dict[str, float]:
    """Mean over the queries, in per cent.

    `mAP` is the average precision of the clips ranked by saliency, `hit@1` how often the first one is relevant.
    Queries without a relevant clip don't count.
    """
    pairs = [(s, e["labels"].numpy()) for s, e in zip(saliency, examples, strict=True) if e["labels"].any()]
    return {
        "mAP": 100 * float(np.mean([average_precision_score(labels, scores) for scores, labels in pairs])),
        "hit@1": 100 * float(np.mean([labels[scores.argmax()] for scores, labels in pairs])),
    }
