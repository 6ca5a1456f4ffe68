"""Training with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_read import PvlaTrainer, PvlaTrainingArguments

from .processes import join_processes


OPTIMIZER = "AdamW, weight decay 0.01, a tenth of the steps warm-up, then a cosine"  # what `train` uses, in words
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


class RatesTrainer(PvlaTrainer):
    """A Trainer whose learning rate differs by module: `learning_rates`, by the end of the module's name."""

    learning_rates: dict[str, float] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on what is trainable, made when the Trainer asks for it: FSDP takes no ready optimizer."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in (cast(nn.Module, self.model) if model is None else model).named_parameters():
            if parameter.requires_grad:
                special = [rate for module, rate in self.learning_rates.items() if f"{module}." in name]
                groups.setdefault(special[0] if special else self.args.learning_rate, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": rate} for rate, p in groups.items()], weight_decay=0.01
        )
        return self.optimizer


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
    log_steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    pvla: dict[str, Any] | None = None,
    pairs: Sequence[dict[str, Any]] | None = None,
    loss: Callable[..., Tensor] | None = None,
    states: Callable[..., Any] | None = None,
    bf16: bool = False,
) -> PvlaTrainer:
    """Train what is trainable in `model`, in place, as `OPTIMIZER` says.

    Args:
        model: what to train.
        examples: what to train it on.
        collator: makes a batch of examples.
        steps: of the optimiser.
        learning_rate: the peak rate.
        learning_rates: rates of modules that differ, by the end of the module's name.
        seed: of the order of the examples.
        batch_size: of all processes together.
        output_dir: the Trainer's folder.
        description: shown with the progress.
        log_steps: steps between two logged losses; a quarter of all by default.
        callbacks: of the Trainer.
        pvla: options of PVLA; none by default, and the Trainer is transformers' own.
        pairs: examples without labels, which PVLA aligns in place of `examples`.
        loss: in place of the model's: of its outputs and the labels.
        states: what PVLA compares, in place of its `pvla_states`: of the model, a batch and the outputs.
        bf16: whether matrix products run in bfloat16, on a CPU as well.
    """
    processes = join_processes().num_processes
    if batch_size % processes:
        raise ValueError(f"A batch of {batch_size} can't be shared equally by {processes} processes.")
    arguments = PvlaTrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size // processes,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        max_grad_norm=1.0,
        logging_steps=log_steps or max(steps // 4, 1),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        seed=seed,
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),
        **({"pvla_weight": 0.0} | (pvla or {})),
    )
    trainer = RatesTrainer(
        model,
        arguments,
        collator,
        examples,
        processing_class=getattr(collator, "tokenizer", None),
        pairs_dataset=pairs,  # type: ignore[arg-type]
        pvla_states=states,
        compute_loss_func=loss,
    )
    trainer.learning_rates = learning_rates or {}
    for callback in callbacks:
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{description}: {trained:,} weights, {steps} steps of {batch_size}", flush=True)
    trainer.train()
    return trainer
