"""Figures of a training step: how large the alignment's gradient is, and whether it learns something."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from .alignment import Aligned, Alignment, rng_kept
from .arguments import PvlaTrainingArguments
from .gradient_share import compared_parameters, gradient_norms
from .health import alignment_health
from .input_states import InputStates
from .metrics import MetricBuffer
from .source import Batch


if TYPE_CHECKING:
    TrainerLike = Trainer
else:
    TrainerLike = object


class MeasuringMixin(TrainerLike):
    """Measures the alignment of a step on all devices: they make the same calls, whatever lies in their batches."""

    args: PvlaTrainingArguments
    _metrics_of_pvla: MetricBuffer

    def measure(self, pvla: Alignment, task: Tensor, alignment: Tensor, aligned: Aligned, batch: Batch) -> None:
        """Set the weight anew, and take the figures of health, where it is time."""
        step, every = self.state.global_step, self.args.pvla_health_steps
        check = every > 0 and step % every == 0 and pvla.checked_at != step
        if pvla.share is not None:
            pvla.share.resume(self.state.log_history)
        weigh = pvla.share is not None and pvla.share.is_due(step)
        if not (check or weigh):
            return
        norms = None
        # With negatives each device's gradients ask all others for theirs, which one without video has none of.
        together = not pvla.loss.negatives or self._all_devices(aligned.details.valid.any())
        measurable = not (self.is_sharded() or self._checkpoints_reentrantly())  # by gradients of parameters
        if together and measurable:
            model, before = cast(nn.Module, self.model), isinstance(pvla.source, InputStates)
            norms = self._mean_over_devices(
                gradient_norms(task, alignment, compared_parameters(model, before), before)
            )
        if norms is None and weigh:  # without video a later batch is measured
            weigh = together and bool(self.accelerator.reduce(aligned.details.valid.sum()) > 0)
        if weigh:
            assert pvla.share is not None
            if norms is None:
                raise RuntimeError(
                    "The gradient that pvla_gradient_share compares reaches none of READ's weights. With gradient "
                    "checkpointing, set gradient_checkpointing_kwargs={'use_reentrant': False}. Where the states are "
                    "none of READ's, set a pvla_weight instead."
                )
            if pvla.share.measure(step, norms):
                # The log travels with checkpoints, so a resumed run goes on with this weight.
                self.state.log_history.append({"pvla_weight": pvla.weight, "step": step})
        if check:
            pvla.checked_at = step
            pvla.warn_of_twins(aligned.states, batch)
            with torch.no_grad(), rng_kept(self.args.device):
                can_run = not (pvla.source.met and self.is_sharded())
                mismatched = pvla.source.mismatched(aligned.states, batch) if can_run else None
            health = alignment_health(pvla.loss, aligned.states, aligned.details, mismatched)
            if norms is not None:
                health["gradient_share"] = pvla.weight * norms[1] / norms[0]
            self._metrics_of_pvla.append("train", {f"pvla_{name}": value for name, value in health.items()})

    def _all_devices(self, holds: Tensor) -> bool:
        return bool(self.accelerator.reduce(holds.long()) == self.accelerator.num_processes)

    def _mean_over_devices(self, norms: Tensor | None) -> Tensor | None:
        """Over the devices that have norms; None if no device has."""
        own = torch.zeros(3, device=self.args.device) if norms is None else torch.cat([norms, norms.new_ones(1)])
        *sums, count = self.accelerator.reduce(own).unbind()
        return torch.stack(sums) / count if count > 0 else None

    def _checkpoints_reentrantly(self) -> bool:
        options = self.args.gradient_checkpointing_kwargs
        return bool(self.args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"))

    def is_sharded(self) -> bool:
        """Whether each device has a part of the weights only."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
