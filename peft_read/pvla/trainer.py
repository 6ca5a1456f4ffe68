"""Trainers that add the alignment of video and language (PVLA) to the task's loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from .arguments import PvlaArguments, PvlaTrainingArguments
from .health import alignment_health, gradient_norms
from .loss import PvlaDetails
from .picture import ExamplePlan, example_plan, log_plan
from .states import TOKEN_MASKS, StateFunction, VideoTextStates, state_source


# Steps between two measurements of the weight that gives the alignment its share of the gradient.
WEIGH_EVERY = 10

if TYPE_CHECKING:
    TrainerLike = Trainer
else:
    TrainerLike = object


class PvlaMixin(TrainerLike):
    """Makes a Trainer class add PVLA: inherit from this and from the class, in this order.

    The loss is the task's plus `pvla_weight` times the alignment's (arXiv 2312.06950). Both are logged, as `task_loss`
    and `pvla_loss`, in training and in evaluation; every `pvla_health_steps`, `pvla_residual`, `pvla_pairs`,
    `pvla_gap` and `pvla_gradient_share` as well (see [`alignment_health`]). With a weight of 0 and no gradient share
    the Trainer does what it does without this.

    Args:
        args: training arguments that inherit from [`PvlaArguments`].
        pvla_states: where the states come from, in place of the arguments' `pvla_states`: a function of the model, the
            batch and the model's outputs that gives [`VideoTextStates`], or a name.

    Raises:
        TypeError: if the arguments don't have the options of PVLA.
        ValueError: if model and data don't tell what is video and what is text, several devices would be used by
            `nn.DataParallel`, or a gradient share is asked for of sharded weights.
    """

    args: PvlaTrainingArguments

    def __init__(self, *args: Any, pvla_states: str | StateFunction | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, PvlaArguments):
            raise TypeError(
                f"{type(self).__name__} got {type(self.args).__name__}, which has no options of PVLA. Use "
                "PvlaTrainingArguments, PvlaSeq2SeqTrainingArguments, or a class that inherits from PvlaArguments."
            )
        self._pvla = self.args.pvla_loss()
        self._source = None
        self._token_masks: dict[str, Tensor] = {}
        self._start_run()
        self._evaluated: Tensor | None = None
        self._plan: ExamplePlan | None = None
        self._eval_parts: list[Tensor] = []
        if not self.args.uses_pvla:
            return
        if self.args.n_gpu > 1:
            raise ValueError(
                f"PVLA doesn't work with nn.DataParallel, which the Trainer uses for {self.args.n_gpu} devices in one "
                "process. Start one process for each device: `torchrun --nproc_per_node ...` or `accelerate launch`."
            )
        if self.args.pvla_gradient_share is not None and self._is_sharded():
            raise ValueError(
                "pvla_gradient_share can't be measured on weights that FSDP or DeepSpeed shards. Set a pvla_weight "
                "instead: the one that a run on one device logs as `pvla_weight` is a good start."
            )
        model = cast(nn.Module, self.model)
        self._source = state_source(model, self.args.pvla_states if pvla_states is None else pvla_states)
        self._check_data()
        if self.label_smoother is None and _loss_is_a_mean(model):
            # transformers takes `**kwargs` in a forward for a loss that divides by `num_items_in_batch`, and would
            # multiply this one by the number of processes and of accumulated batches.
            self.model_accepts_loss_kwargs = False

    def _start_run(self) -> None:
        self._samples_in_step: Tensor | None = None
        self._weight: float | None = None if self.args.pvla_gradient_share else self.args.pvla_weight
        self._weighed_at = self._checked_at = -1
        self._logged_step = 0
        self._parts: Tensor | None = None
        self._health: dict[str, Tensor] = {}

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._start_run()
        return super()._inner_training_loop(*args, **kwargs)

    def _check_data(self) -> None:
        """Whether a batch tells video from text, as far as one can be made of the first example."""
        try:
            example = cast(Any, self.train_dataset)[0]
            if isinstance(example, Mapping) and TOKEN_MASKS[0] in example:
                return
            with torch.random.fork_rng(devices=[]):
                batch = self.data_collator([example])
        except Exception:  # a stream, no data yet, or what training itself will stumble over
            return
        assert self._source is not None
        self._source.check(batch)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        columns += [name for name in TOKEN_MASKS if name not in columns]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, of which the samples that can be aligned are counted."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._source is not None:
            counts = [self._source.samples(batch) for batch in batches]
            known = [count.to(self.args.device) for count in counts if count is not None]
            self._samples_in_step = self.accelerator.reduce(sum(known)) if known else None
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss plus the weighted alignment loss; arguments and result as of the Trainer's."""
        inputs, masks = _without_token_masks(inputs)
        if self._source is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = {**inputs, **self._on_device(masks or self._token_masks)}  # before the Trainer takes labels out
        with self._source.recording():
            task, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            states = self._source.states(model, batch, outputs)
        details = self._pvla.details(*states)
        in_step = self.is_in_train and model.training
        if in_step and torch.is_grad_enabled() and not details.distance.requires_grad:
            raise RuntimeError("PVLA's states carry no gradient: no adapter that is trained comes before them.")
        divisor = self._batches_divided_by(num_items_in_batch) if in_step else 1
        alignment = self._mean_over_step(details) if in_step else _mean(details)
        if in_step:
            self._measure(task / divisor, alignment, states, details)
            self._remember(task / divisor, alignment)
        elif not model.training:
            self._evaluated = torch.stack([task.detach().float(), alignment.detach()])
            if self.args.pvla_plot_plans and self._plan is None and details.valid.any():
                first = int(details.valid.float().argmax())
                self._plan = example_plan(first, details, states, self._source.words(batch), self.processing_class)
        loss = task + (self._weight or 0.0) * divisor * alignment.to(task.dtype)
        return (loss, outputs) if return_outputs else loss

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return cast(dict[str, Any], self._prepare_input(cast(Any, batch)))

    def _batches_divided_by(self, num_items_in_batch: Tensor | int | None) -> int:
        """By how many accumulated batches the Trainer will divide the loss that it gets."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = scaled or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def _mean_over_step(self, details: PvlaDetails) -> Tensor:
        """This batch's part of the mean over all samples of the optimizer step, on all devices."""
        if self._samples_in_step is None:
            return _mean(details) / self.current_gradient_accumulation_steps
        samples = self._samples_in_step.clamp(min=1)
        return details.distance.sum() * self.accelerator.num_processes / samples  # gradients are averaged over devices

    def _measure(self, task: Tensor, alignment: Tensor, states: VideoTextStates, details: PvlaDetails) -> None:
        """Set the weight anew, and take the figures of health, where it is time."""
        step, every = self.state.global_step, self.args.pvla_health_steps
        share = self.args.pvla_gradient_share
        check = every > 0 and step % every == 0 and self._checked_at != step
        if share and self._weight is None:  # a resumed run
            logged = [entry["pvla_weight"] for entry in self.state.log_history if "pvla_weight" in entry]
            self._weight = logged[-1] if logged else None
        weigh = share is not None and self._weighed_at != step and (step % WEIGH_EVERY == 0 or self._weight is None)
        if not (check or weigh):
            return
        norms = None if self._is_sharded() else gradient_norms([task, alignment], self._aligned_parameters())
        norms = None if norms is None else self.accelerator.reduce(norms, reduction="mean")
        if weigh:
            assert share is not None
            if norms is None:
                raise RuntimeError(
                    "The gradient that pvla_gradient_share compares reaches none of READ's weights. With gradient "
                    "checkpointing, set gradient_checkpointing_kwargs={'use_reentrant': False}. Where the states are "
                    "none of READ's, set a pvla_weight instead."
                )
            weight = share * (norms[0] / norms[1]).item()
            if math.isfinite(weight):  # else there is nothing to align in this batch, or a loss overflows
                self._weighed_at, self._weight = step, weight
                # The log travels with checkpoints, so a resumed run goes on with this weight.
                self.state.log_history.append({"pvla_weight": weight, "step": step})
        if check:
            assert self._source is not None
            self._checked_at = step
            self._health = alignment_health(self._pvla, states, details, self._source.blocks)
            if norms is not None:
                self._health["gradient_share"] = (self._weight or 0.0) * norms[1] / norms[0]

    def _is_sharded(self) -> bool:
        """Whether the graph ends in other tensors than the parameters, whose gradient can't be asked for then."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def _aligned_parameters(self) -> list[nn.Parameter]:
        """READ's trained weights, else all trained ones."""
        trained = {n: p for n, p in cast(nn.Module, self.model).named_parameters() if p.requires_grad}
        return [p for n, p in trained.items() if ".read_" in n] or list(trained.values())

    def _remember(self, task: Tensor, alignment: Tensor) -> None:
        parts = torch.stack([task.detach().float(), alignment.detach().float()])
        if self._parts is None:
            self._logged_step, self._parts = self.state.global_step, parts
        else:
            self._parts = self._parts + parts

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the two parts of the training loss, and the alignment's health, beside what the Trainer logs."""
        if "loss" in logs and self._parts is not None:
            steps = max(self.state.global_step - self._logged_step, 1)
            logs["task_loss"], logs["pvla_loss"] = (self.accelerator.reduce(self._parts, "mean") / steps).tolist()
            if self.args.pvla_gradient_share is not None and self._weight is not None:
                logs["pvla_weight"] = self._weight
            logs.update({f"pvla_{name}": value.item() for name, value in self._health.items()})
            self._parts, self._health = None, {}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def transport_plans(self, dataset: Dataset) -> list[ExamplePlan]:
        """The plans by which the model, as it is now, aligns a data set's samples; of several devices, each its own.

        Raises:
            ValueError: if the Trainer was made without PVLA.
        """
        if self._source is None:
            raise ValueError("There are no transport plans without PVLA: set `pvla_weight` or `pvla_gradient_share`.")
        model = cast(nn.Module, self.model).eval()
        plans = []
        for loaded in self.get_eval_dataloader(dataset):
            batch = self._on_device(loaded)
            with self._source.recording(), self.compute_loss_context_manager():
                states = self._source.states(model, batch, model(**_without_token_masks(batch)[0]))
                details = self._pvla.details(*states)
            samples, words = range(len(details.valid) // self._source.blocks), self._source.words(batch)
            plans += [example_plan(i, details, states, words, self.processing_class) for i in samples]
        return plans

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """The Trainer's own, to which neither the model nor `generate` sees the token masks."""
        inputs, self._token_masks = _without_token_masks(inputs)
        self._evaluated = None
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
            if self._source is not None and loss is not None and self._evaluated is None:
                # Where it generates, the Trainer takes the model's own loss.
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach().mean()
        finally:
            self._token_masks = {}
        if self._evaluated is not None:
            rows = self._evaluated.repeat(cast(int, find_batch_size(inputs)), 1)
            self._eval_parts.append(self.accelerator.gather_for_metrics(rows))
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's own, with the two parts of the loss among the metrics."""
        self._eval_parts, self._plan = [], None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_parts:
            assert output.metrics is not None
            task, alignment = torch.cat(self._eval_parts).mean(0).tolist()
            output.metrics[f"{metric_key_prefix}_task_loss"] = task
            output.metrics[f"{metric_key_prefix}_pvla_loss"] = alignment
            # Seq2SeqTrainer counts a last batch as if it were a whole one.
            output.metrics[f"{metric_key_prefix}_loss"] = task + (self._weight or 0.0) * alignment
        if self._plan is not None and self.is_world_process_zero():
            log_plan(self, self._plan, metric_key_prefix)
        return output


class PvlaTrainer(PvlaMixin, Trainer):
    """transformers' `Trainer` with PVLA, see [`PvlaMixin`]; takes [`PvlaTrainingArguments`]."""


class PvlaSeq2SeqTrainer(PvlaMixin, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` with PVLA, see [`PvlaMixin`]; takes [`PvlaSeq2SeqTrainingArguments`]."""


def _mean(details: PvlaDetails) -> Tensor:
    return details.distance.sum() / details.valid.sum().clamp(min=1)


def _without_token_masks(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    masks = {name: inputs[name] for name in TOKEN_MASKS if name in inputs}
    return {name: value for name, value in inputs.items() if name not in masks}, masks


def _loss_is_a_mean(model: nn.Module) -> bool:
    """Whether a transformers model takes `**kwargs` but its loss doesn't divide by `num_items_in_batch`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return False
    names = inspect.unwrap(type(base).forward).__code__.co_names
    if "loss_function" in names:
        return "num_items_in_batch" not in inspect.signature(base.loss_function).parameters
    return any(name.endswith("Loss") or name == "cross_entropy" for name in names)
