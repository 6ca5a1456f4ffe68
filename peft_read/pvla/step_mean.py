"""The task's loss as a mean over the labels of an optimizer step, whatever a model makes of their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Trainer


if TYPE_CHECKING:
    TrainerLike = Trainer
else:
    TrainerLike = object


class StepMeanMixin(TrainerLike):
    """Makes a Trainer's loss the mean over all labels of an optimizer step, on all devices."""

    def step_mean_loss(
        self, model: nn.Module, inputs: dict[str, Any], with_outputs: bool, num_items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """A batch's part of the loss, and the outputs if they are asked for: they may cost another forward.

        Where the Trainer takes the loss for a sum over the step's labels, divided by their number, many models give a
        batch's mean all the same. So each is told the number of the batch's own labels, which makes a mean of either,
        and the mean counts by its share of the step's labels.

        Args:
            model: as the Trainer calls it.
            inputs: likewise.
            with_outputs: whether to ask for the outputs.
            num_items: the number of the step's labels, None if the Trainer doesn't count them.
        """
        labels = self._count_labels(inputs) if num_items is not None and self._is_scaled(num_items) else None
        told = num_items if labels is None else labels.clamp(min=1)
        found = super().compute_loss(model, inputs, with_outputs, cast(Any, told))
        loss, outputs = cast(tuple[Tensor, Any], found if with_outputs else (found, None))
        if labels is not None and num_items is not None:
            loss = loss * (labels / num_items).to(loss.dtype)
        return loss, outputs

    def batches_divided_by(self, num_items: Tensor | int | None) -> int:
        """By how many accumulated batches the Trainer will divide the loss that it gets."""
        return 1 if self._is_scaled(num_items) else self.current_gradient_accumulation_steps

    def _is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether the Trainer takes a batch's loss for its part of the step's: by its switch, else as it decides."""
        declared: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def _count_labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """As the Trainer counts those of a step: without the first, which causal language models don't predict."""
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs.get("labels")
            if isinstance(labels, Tensor) and getattr(self, "_loss_shifts_labels", False):
                labels = labels[..., 1:]
        return labels.ne(-100).sum() if isinstance(labels, Tensor) else None
