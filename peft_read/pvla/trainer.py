"""Trainers that add the alignment of video and language (PVLA) to the task's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from .alignment import Aligned, Alignment, EvaluatedBatch, check_batch, evaluating, mean_distance, rng_kept
from .arguments import PvlaArguments, PvlaTrainingArguments
from .loss import PvlaDetails
from .measuring import MeasuringMixin
from .metrics import MetricBuffer
from .pairs import PairBatches
from .picture import ExamplePlan, example_plan, log_plan
from .source import TOKEN_MASKS, Batch, StateFunction, masks_taken, token_masks, without_token_masks
from .step_mean import StepMeanMixin


if TYPE_CHECKING:
    TrainerLike = Trainer
else:
    TrainerLike = object


class PvlaMixin(MeasuringMixin, StepMeanMixin, TrainerLike):
    """Makes a Trainer class add PVLA: inherit from this and from the class, in this order.

    The loss is the task's plus `pvla_weight` times the alignment's (arXiv 2312.06950). Both are logged, as `task_loss`
    and `pvla_loss`, in training and in evaluation; every `pvla_health_steps`, `pvla_residual`, `pvla_pairs`,
    `pvla_gap` and `pvla_gradient_share` as well (see [`alignment_health`]). With a weight of 0 and no gradient share
    the Trainer does what it does without this.

    The task's loss of an optimizer step is its mean over all labels of the step, on all devices, however many batches
    are accumulated, also where the model gives a batch's mean and the Trainer takes it for a part of the step's.

    Args:
        args: training arguments that inherit from [`PvlaArguments`].
        pvla_states: where the states come from, in place of the arguments' `pvla_states`: a function of the model, the
            batch and the model's outputs that gives [`VideoTextStates`], or a name.
        pairs_dataset: videos with sentences, without labels, in the columns of the training data. Each optimizer step
            aligns a batch of `pvla_pairs_batch_size` of them on each device, in place of the labelled samples;
            evaluation aligns the samples that are evaluated.

    Raises:
        TypeError: if the arguments don't have the options of PVLA.
        ValueError: if model and data don't tell what is video and what is text, several devices would be used by
            `nn.DataParallel`, a gradient share or pairs are asked for with sharded weights, or there are negatives for
            states that have met.
    """

    args: PvlaTrainingArguments

    def __init__(
        self,
        *args: Any,
        pvla_states: str | StateFunction | None = None,
        pairs_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, PvlaArguments):
            raise TypeError(
                f"{type(self).__name__} got {type(self.args).__name__}, which has no options of PVLA. Use "
                "PvlaTrainingArguments, PvlaSeq2SeqTrainingArguments, or a class that inherits from PvlaArguments."
            )
        self.pairs_dataset = pairs_dataset
        self._given_states = pvla_states
        self._metrics_of_pvla = MetricBuffer()
        self._evaluated: EvaluatedBatch | None = None
        self._plan: ExamplePlan | None = None
        self._pvla = self._new_alignment()
        if self._pvla is not None:
            self._check_data(self._pvla)

    def _new_alignment(self) -> Alignment | None:
        """What is aligned in a run with the model and the arguments as they are now, which a search changes."""
        if not self.args.uses_pvla:
            return None
        if self.args.n_gpu > 1:
            raise ValueError(
                f"PVLA doesn't work with nn.DataParallel, which the Trainer uses for {self.args.n_gpu} devices in one "
                "process. Start one process for each device: `torchrun --nproc_per_node ...` or `accelerate launch`."
            )
        if self.args.pvla_gradient_share is not None and self.is_sharded():
            raise ValueError(
                "pvla_gradient_share can't be measured on weights that FSDP or DeepSpeed shards. Set a pvla_weight "
                "instead: the one that a run on one device logs as `pvla_weight` is a good start."
            )
        pairs = None if self.pairs_dataset is None else self._pair_batches(self.pairs_dataset)
        if self.args.pvla_negatives:
            option = "per_device_train_batch_size" if pairs is None else "pvla_pairs_batch_size"
            check_batch(getattr(self.args, option), self.args.world_size, f"raise {option}")
            if self.eval_dataset is not None:
                self._check_evaluated_batch()
        states = self.args.pvla_states if self._given_states is None else self._given_states
        return Alignment(cast(nn.Module, self.model), self.args, states, pairs, self.processing_class)

    def _check_evaluated_batch(self) -> None:
        option = "per_device_eval_batch_size"
        check_batch(getattr(self.args, option), self.args.world_size, f"raise {option}")

    def _pair_batches(self, dataset: Any) -> PairBatches:
        if self.is_sharded():
            raise ValueError(
                "pairs_dataset doesn't work with weights that FSDP or DeepSpeed shards: pairs run through the model "
                "apart from the task. Train with DDP, or align the pairs first, on their own."
            )
        if isinstance(dataset, Mapping):
            names = ", ".join(map(repr, dataset))
            raise ValueError(f"pairs_dataset is a {type(dataset).__name__} with {names}: give one split of it.")
        if self.args.pvla_words != "all":
            raise ValueError(
                f"pvla_words={self.args.pvla_words!r} tells words by labels, and pairs have none. Leave it out, and "
                "let the collator give 'text_token_mask' where not all text is meant."
            )
        collate = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="pairs")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="pairs")
        return PairBatches(
            dataset,
            collate,
            self.args.pvla_pairs_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            processes=self.args.world_size,
            workers=self.args.dataloader_num_workers,
        )

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        # The model and the arguments are the run's by now: `model_init` makes a model, a search sets arguments.
        self._pvla = self._new_alignment()
        if self._pvla is not None and self._pvla.loss.negatives and self._pvla.pairs is None and batch_size:
            mend = "auto_find_batch_size came down to it. Let a sample take less memory, or leave pvla_negatives out"
            check_batch(batch_size, self.args.world_size, mend)
        self._metrics_of_pvla.take("train")
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _check_data(self, pvla: Alignment) -> None:
        """Whether a batch tells video from text, as far as one can be made of the first example."""
        datasets = [self.train_dataset] if pvla.pairs is None else [pvla.pairs.dataset, self.eval_dataset]
        for dataset in datasets:
            try:
                example = cast(Any, dataset)[0]
                collate = self._get_collator_with_removed_columns(self.data_collator, description="checked")
                with torch.random.fork_rng(devices=[]):
                    batch = self._on_device(collate([example]))
            except Exception:  # a stream, no data yet, or what training itself will stumble over
                continue
            if pvla.pairs is not None:
                batch = self._without_labels(batch)
            with rng_kept(self.args.device), evaluating(cast(nn.Module, self.model)):
                pvla.source.check(batch, cast(nn.Module, self.model))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        columns += [name for name in TOKEN_MASKS if name not in columns]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, of which the samples that can be aligned are counted."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._pvla is not None:
            self._pvla.starts_step = True
            self._pvla.samples_in_step = None
            if self._pvla.pairs is None:
                counts = [self._pvla.source.samples(batch) for batch in batches]
                known = [count.to(self.args.device) for count in counts if count is not None]
                self._pvla.samples_in_step = self.accelerator.reduce(sum(known)) if known else None
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss plus the weighted alignment loss; arguments and result as of the Trainer's."""
        masks = ({} if self._evaluated is None else self._evaluated.masks) | token_masks(inputs)
        inputs, pvla = without_token_masks(inputs, self._masks_of_model()), self._pvla
        if pvla is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = {**inputs, **self._on_device(masks)}  # before the Trainer takes labels out
        in_step = self.is_in_train and model.training
        divisor = self.batches_divided_by(num_items_in_batch) if in_step else 1
        if in_step and pvla.pairs is not None:
            task, outputs = self.step_mean_loss(model, inputs, return_outputs, num_items_in_batch)
            alignment = torch.zeros((), device=task.device)
            if pvla.starts_step:
                # Of the step's task this batch is a part, of its alignment the pairs are the whole.
                alignment = self._align_pairs(pvla, task / divisor * self.current_gradient_accumulation_steps)
        else:
            with pvla.source.recording():
                asks = return_outputs or pvla.source.reads_outputs
                task, outputs = self.step_mean_loss(model, inputs, asks, num_items_in_batch)
                aligned = pvla.align(pvla.source.states(model, batch, outputs), batch)
                if in_step:
                    alignment = self._mean_over_step(pvla, aligned.details)
                    self.measure(pvla, task / divisor, alignment, aligned, batch)
                else:
                    alignment = mean_distance(aligned.details)
            if not model.training:
                self._remember_evaluated(pvla, task, aligned, batch)
        if in_step:
            parts = {"task_loss": task / divisor, "pvla_loss": alignment}
            self._metrics_of_pvla.append("train", parts, to_last=not pvla.starts_step)
            pvla.starts_step = False
        loss = task + pvla.weight * divisor * alignment.to(task.dtype)
        return (loss, outputs) if return_outputs else loss

    def _align_pairs(self, pvla: Alignment, task: Tensor) -> Tensor:
        """The alignment of the step's batch of pairs, a mean over those of all devices."""
        assert pvla.pairs is not None
        # Past what wraps the model for several devices: its weights' gradients are averaged with the task's.
        model = cast(nn.Module, self.model)
        batch = self._without_labels(self._on_device(pvla.pairs.at(self.state.global_step)))
        with self.compute_loss_context_manager(), pvla.source.recording():
            outputs = pvla.source.run(model, batch)
            aligned = pvla.align(pvla.source.states(model, batch, outputs), batch)
            pvla.samples_in_step = self.accelerator.reduce(aligned.details.valid.sum())
            alignment = self._mean_over_step(pvla, aligned.details)
            self.measure(pvla, task, alignment, aligned, batch)
        return alignment

    def _mean_over_step(self, pvla: Alignment, details: PvlaDetails) -> Tensor:
        """This batch's part of the mean over all samples of the optimizer step, on all devices."""
        if torch.is_grad_enabled() and not details.loss.requires_grad and details.valid.any():
            raise RuntimeError(pvla.source.untrained())
        if pvla.samples_in_step is None:
            return mean_distance(details) / self.current_gradient_accumulation_steps
        samples = pvla.samples_in_step.clamp(min=1)
        return details.loss.sum() * self.accelerator.num_processes / samples  # gradients are averaged over devices

    def _remember_evaluated(self, pvla: Alignment, task: Tensor, aligned: Aligned, batch: Batch) -> None:
        if self._evaluated is not None:
            self._evaluated.task, self._evaluated.details = task, aligned.details
        if self.args.pvla_plot_plans and self._plan is None and aligned.details.valid.any():
            first = int(aligned.details.valid.float().argmax())
            self._plan = self._plan_of(pvla, first, aligned, batch)

    def _plan_of(self, pvla: Alignment, sample: int, aligned: Aligned, batch: Batch) -> ExamplePlan:
        return example_plan(sample, aligned.details, aligned.states, pvla.source.words(batch), self.processing_class)

    def _masks_of_model(self) -> tuple[str, ...]:
        return masks_taken(cast(nn.Module, self.model))

    def _on_device(self, batch: Batch) -> dict[str, Any]:
        return cast(dict[str, Any], self._prepare_input(cast(Any, batch)))

    def _without_labels(self, batch: Batch) -> dict[str, Any]:
        labels = {"labels", *(self.label_names or ())}
        return {name: value for name, value in batch.items() if name not in labels}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the two parts of the training loss, and the alignment's health, beside what the Trainer logs."""
        if "loss" in logs and self._pvla is not None:
            means = self._metrics_of_pvla.take("train")
            if "task_loss" in means:
                parts = torch.stack([means.pop("task_loss"), means.pop("pvla_loss")])
                logs["task_loss"], logs["pvla_loss"] = self.accelerator.reduce(parts, "mean").tolist()
            if self._pvla.share is not None and self._pvla.share.weight is not None:
                logs["pvla_weight"] = self._pvla.share.weight
            logs.update({name: value.item() for name, value in means.items()})
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def transport_plans(self, dataset: Dataset) -> list[ExamplePlan]:
        """The plans by which the model, as it is now, aligns a data set's samples; of several devices, each its own.

        Raises:
            ValueError: if the Trainer was made without PVLA.
        """
        pvla = self._pvla
        if pvla is None:
            raise ValueError("There are no transport plans without PVLA: set `pvla_weight` or `pvla_gradient_share`.")
        model = cast(nn.Module, self.model)
        plans = []
        with evaluating(model), self.compute_loss_context_manager():
            for loaded in self.get_eval_dataloader(dataset):
                batch = self._on_device(loaded)
                with pvla.source.recording():
                    states = pvla.source.states(model, batch, pvla.source.run(model, batch))
                aligned = Aligned(states, pvla.loss.without_negatives().details(*states[:4]))
                samples = range(len(aligned.details.valid) // pvla.source.blocks)
                plans += [self._plan_of(pvla, i, aligned, batch) for i in samples]
        return plans

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """The Trainer's own; model and `generate` see no token masks but those that the model's forward names."""
        self._evaluated = evaluated = EvaluatedBatch(token_masks(inputs))
        inputs = without_token_masks(inputs, self._masks_of_model())
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
            if self._pvla is not None and loss is not None and evaluated.details is None:
                # Where it generates, the Trainer takes the model's own loss.
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach().mean()
        finally:
            self._evaluated = None
        if evaluated.details is not None:
            negatives = self._pvla is not None and self._pvla.loss.negatives
            if negatives:
                self._check_evaluated_batch()
            rows = evaluated.rows(cast(int, find_batch_size(inputs)), negatives)
            task, alignment, compared = self.accelerator.gather_for_metrics(rows).unbind(1)
            self._metrics_of_pvla.append("eval", {"task_loss": task, "pvla_loss": alignment, "compared": compared})
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
        self._plan = None
        self._metrics_of_pvla.take("eval")
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        parts = {name: value.item() for name, value in self._metrics_of_pvla.take("eval").items()}
        if parts and self._pvla is not None:
            assert output.metrics is not None
            compared = parts.pop("compared")
            parts["pvla_loss"] /= compared or 1.0
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in parts.items()})
            # Seq2SeqTrainer counts a last batch as if it were a whole one.
            whole = parts["task_loss"] + self._pvla.weight * parts["pvla_loss"]
            output.metrics[f"{metric_key_prefix}_loss"] = whole
        if self._plan is not None and self.is_world_process_zero():
            log_plan(self, self._plan, metric_key_prefix)
        return output


class PvlaTrainer(PvlaMixin, Trainer):
    """transformers' `Trainer` with PVLA, see [`PvlaMixin`]; takes [`PvlaTrainingArguments`]."""


class PvlaSeq2SeqTrainer(PvlaMixin, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` with PVLA, see [`PvlaMixin`]; takes [`PvlaSeq2SeqTrainingArguments`]."""
