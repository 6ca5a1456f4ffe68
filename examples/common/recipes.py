"""Recipes: the settings of a run on a benchmark, as a YAML file, and a Trainer that follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import nn

from peft_read import PvlaTrainer, PvlaTrainingArguments


METHODS = ("read", "full", "head")


@dataclass
class Recipe:
    """The settings of a run.

    Attributes:
        benchmark: its name.
        source: where the settings come from, in words.
        learning_rate: of each of `METHODS`.
        batch_size: samples in a batch.
        epochs: passes over the training samples.
        domains: that are trained and scored one by one; none: the set is one.
        data: options of the benchmark's reader.
        evaluate: the split that is scored.
        model: fields of the model's configuration.
        adapter: fields of `ReadConfig`.
        pvla: fields of `PvlaArguments`.
        faster: modules of higher rates: by the end of their names, times what.
        accumulation: batches in a step.
        weight_decay: of Adam.
        max_grad_norm: to which gradients are cut; 0: they aren't.
        decay: factor of the rates after every `decay_epochs`.
        decay_epochs: as said.
    """

    benchmark: str
    source: str
    learning_rate: dict[str, float]
    batch_size: int
    epochs: int
    domains: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    evaluate: str = "val"
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    pvla: dict[str, Any] = field(default_factory=lambda: {"pvla_weight": 0.0})
    faster: dict[str, float] = field(default_factory=dict)
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    decay: float = 1.0
    decay_epochs: int = 10


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        FileNotFoundError: if the file isn't there.
        ValueError: if it isn't a mapping of `Recipe`'s attributes; the message names what is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The recipe {path} isn't there.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}.")
    known = {each.name for each in fields(Recipe)}
    required = ("benchmark", "source", "learning_rate", "batch_size", "epochs")
    for what, names in (("unknown", content.keys() - known), ("missing", set(required) - content.keys())):
        if names:
            raise ValueError(f"{path}: {what} {', '.join(map(repr, sorted(names)))}; a recipe has {sorted(known)}.")
    recipe = Recipe(**content)
    if not isinstance(recipe.learning_rate, dict) or set(recipe.learning_rate) != set(METHODS):
        raise ValueError(f"{path}: `learning_rate` must have one of each of {METHODS}.")
    numbers = [*recipe.learning_rate.values(), recipe.batch_size, recipe.epochs, recipe.accumulation]
    # YAML reads 1e-2 without a point as text.
    if not all(isinstance(number, (int, float)) and number > 0 for number in numbers):
        raise ValueError(f"{path}: rates, `batch_size`, `epochs` and `accumulation` must be positive numbers.")
    return recipe


class RecipeTrainer(PvlaTrainer):
    """A Trainer with plain Adam, rates that differ by module, and rates that fall in steps."""

    recipe: Recipe

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam, with weight decay in the gradient."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in (cast(nn.Module, self.model) if model is None else model).named_parameters():
            if parameter.requires_grad:
                times = [factor for module, factor in self.recipe.faster.items() if f"{module}." in name]
                groups.setdefault(self.args.learning_rate * (times[0] if times else 1), []).append(parameter)
        rates = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
        self.optimizer = torch.optim.Adam(rates, weight_decay=self.recipe.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Steps of `decay` after every `decay_epochs` epochs."""
        steps = max(num_training_steps * self.recipe.decay_epochs // max(round(self.args.num_train_epochs), 1), 1)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer or self.optimizer, steps, self.recipe.decay)
        return self.lr_scheduler


def make_trainer(
    recipe: Recipe,
    model: nn.Module,
    samples: Sequence[Any],
    collator: Any,
    *,
    method: str,
    epochs: int,
    labels: list[str],
    output: Path,
    seed: int,
) -> RecipeTrainer:
    """A Trainer that follows a recipe.

    Args:
        recipe: its settings.
        model: what to train.
        samples: to train on.
        collator: makes a batch of samples.
        method: one of `METHODS`; only READ is trained with PVLA.
        epochs: in place of the recipe's.
        labels: names of the labels in a batch.
        output: folder for what the Trainer writes.
        seed: of the order of the samples.
    """
    arguments = PvlaTrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        learning_rate=recipe.learning_rate[method],
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=labels,
        seed=seed,
        **(recipe.pvla if method == "read" else {"pvla_weight": 0.0}),
    )
    trainer = RecipeTrainer(model, arguments, collator, samples)  # type: ignore[arg-type]
    trainer.recipe = recipe
    return trainer
