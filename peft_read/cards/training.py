"""What a Trainer knows for the card: data, metrics and hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from peft import PeftModel
from transformers import Trainer
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import has_length

from .base import base_of
from .content import Facts
from .page import listed


NO_METRICS = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "step"}


def facts_of_trainer(trainer: Trainer, model: PeftModel, given: Mapping[str, Any]) -> Facts:
    """What a Trainer knows.

    Args:
        trainer: the Trainer.
        model: its model, unwrapped.
        given: the arguments of the Trainer's `create_model_card`.
    """
    task = given["tasks"] or base_of(model).task
    summary = TrainingSummary.from_trainer(trainer, **{**given, "tags": listed(given["tags"]), "tasks": task})
    names, ids = listed(summary.dataset), listed(summary.dataset_tags)
    metrics = _metrics(trainer)
    results = []
    if isinstance(task, str) and names:
        results = [EvalResult(task, (ids or names)[0], names[0], name, value) for name, value in metrics.items()]
    metadata = {"language": summary.language, "license": summary.license, "datasets": ids, "tags": summary.tags}
    metadata |= {"base_model": given["finetuned_from"], "pipeline_tag": given["tasks"]}
    if given["model_name"] not in (
        None,
        Path(str(trainer.args.output_dir)).name,
        str(trainer.hub_model_id).split("/")[-1],
    ):
        metadata["model_name"] = given["model_name"]
    data = _data(trainer, names)
    return Facts(
        data=data if names else None,
        unnamed_data=data,
        results=results,
        metrics={} if results else metrics,
        training=_training(trainer, summary),
        metadata={name: value for name, value in metadata.items() if value},
    )


def _metrics(trainer: Trainer) -> dict[str, float]:
    """Those of the last evaluation."""
    logs = (log for log in reversed(trainer.state.log_history) if any(name.startswith("eval_") for name in log))
    last = {name.removeprefix("eval_"): value for name, value in next(logs, {}).items()}
    numbers = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    # NumPy's floats are floats, too, but YAML doesn't know them.
    return {name: v if isinstance(v, int) else float(v) for name, v in numbers.items() if name not in NO_METRICS}


def _data(trainer: Trainer, names: list[str]) -> str | None:
    if trainer.train_dataset is None:
        return None
    text = f"Trained on {', '.join(names) or 'data that the Trainer knew no name of'}{_size(trainer.train_dataset)}"
    if trainer.eval_dataset is not None:
        text += f", evaluated on held-out data{_size(trainer.eval_dataset)}"
    return f"{text}."


def _size(dataset: Any) -> str:
    if isinstance(dataset, dict):  # several to evaluate on
        return f" ({', '.join(dataset)})"
    return f" ({len(dataset):,} samples)" if has_length(dataset) else ""


def _training(trainer: Trainer, summary: TrainingSummary) -> dict[str, Any]:
    values = dict(summary.hyperparameters or {}) | {"optimizer steps done": trainer.state.global_step}
    if getattr(trainer.args, "uses_pvla", False):
        options = {option.name for option in dataclasses.fields(trainer.args) if option.name.startswith("pvla_")}
        values |= {name: getattr(trainer.args, name) for name in sorted(options)}
    return values
