"""The meeting of the towers at each level: sorts what their blocks bring by time, and lets it interact."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..lockstep.batch import LockstepBatch
from ..lockstep.composite import Exchange
from .adapter import LsttaAdapter
from .interaction import Messages, Stream, interact
from .windows import Windows, plan_windows


@dataclass(frozen=True)
class Offer:
    """What a block brings to a meeting.

    Attributes:
        adapters: by name, the block's adapters that act in this forward.
        projections: by name, what each made of the hidden states: `(rows, tokens, 3 * r)`.
        names: the adapter of each sample, where they differ from sample to sample.
    """

    adapters: dict[str, LsttaAdapter]
    projections: dict[str, Tensor]
    names: list[str] | None = None


class LsttaExchange:
    """What LSTTA sets as `make_exchange` of the composite model.

    Blocks can't meet inside of a part that is checkpointed as a whole, such as a stage of a Swin, because the towers
    won't meet again when it is recomputed: checkpointing of such parts is switched off, not that of their blocks.

    Attributes:
        importance: by adapter, importance of the frames at each level of the last forward, `(batch, time steps)` each.
        stages: the parts around adapted blocks that could be checkpointed as a whole.
        listeners: modalities of the towers that are told what others find and tell them nothing.
        runs: how many forwards have run their towers through this.
    """

    def __init__(self) -> None:
        self.importance: dict[str, list[Tensor]] = {}
        self.listeners: set[str] = set()
        self.runs = 0
        self.stages: list[GradientCheckpointingLayer] = []
        self._switched_off: list[GradientCheckpointingLayer] = []
        self._watched_since: int | None = None

    def __call__(self, batch: LockstepBatch) -> Exchange:
        """The exchange of one forward."""
        for stage in self.stages:
            if stage.gradient_checkpointing:
                stage.gradient_checkpointing = False
                self._switched_off.append(stage)
        self.importance = {}
        self.runs += 1
        return _Forward(batch, self.importance, self.listeners).serve

    def watch(self, composite: nn.Module) -> None:
        """Look at the next forward of the model, and warn if it doesn't run its towers through this."""
        self.leave(composite)
        composite.register_forward_pre_hook(self._begin)
        composite.register_forward_hook(self._end)

    def leave(self, composite: nn.Module) -> None:
        """Stop looking at the model's forwards."""
        for hooks in (composite._forward_pre_hooks, composite._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]

    @torch.compiler.disable
    def _begin(self, composite: nn.Module, args: tuple[Any, ...]) -> None:
        self._watched_since = self.runs

    @torch.compiler.disable
    def _end(self, composite: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layers = [module for module in composite.modules() if isinstance(module, BaseTunerLayer)]
        if all(layer.disable_adapters or not layer.active_adapters for layer in layers):
            return
        self.leave(composite)
        if self.runs == self._watched_since:
            warnings.warn(
                f"LSTTA did nothing in the forward of this {type(composite).__name__}, which ran its towers without "
                "peft_read.lockstep.run_towers: no tower met another. Call the towers through run_towers(self, calls, "
                "batch) there.",
                stacklevel=2,
            )

    def restore_checkpointing(self) -> None:
        """Switch on again what was switched off."""
        for stage in self._switched_off:
            stage.gradient_checkpointing = True
        self._switched_off.clear()


@dataclass
class _Forward:
    """One forward of the towers."""

    batch: LockstepBatch
    importance: dict[str, list[Tensor]]
    listeners: set[str]
    plans: dict[tuple[object, ...], Windows] = field(default_factory=dict)

    def serve(self, level: int, offers: dict[str, Offer]) -> dict[str, dict[str, Tensor]]:
        """By tower and adapter, what the tokens of each block are told: `(rows, tokens, r)`."""
        if len(self.batch.towers) < 2:
            raise ValueError(
                f"LSTTA lets modalities interact, but this batch has only {', '.join(self.batch.towers)}. Give inputs "
                "of two or three modalities, or use `disable_adapter()` to run the base model."
            )
        replies: dict[str, dict[str, Tensor]] = {tower: {} for tower in offers}
        self.batch.importance = {}
        for name in dict.fromkeys(name for offer in offers.values() for name in offer.adapters):
            taking_part = {tower: offer for tower, offer in offers.items() if name in offer.adapters}
            for tower, told in self._interact(name, taking_part).items():
                shape = taking_part[tower].projections[name].shape
                replies[tower][name] = self.batch.towers[tower].join(told.timed, told.untimed, shape)
        return replies

    def _interact(self, name: str, offers: Mapping[str, Offer]) -> dict[str, Messages]:
        """By tower, the messages of one adapter, whose weights lie in all the blocks that wait."""
        device = next(iter(offers.values())).projections[name].device
        streams: dict[str, Stream] = {}
        masks: dict[str, Tensor] = {}
        for tower, offer in offers.items():
            described = self.batch.towers[tower]
            timed, untimed = described.split(offer.projections[name].to(device))
            valid, untimed_valid = described.masks(timed, untimed)
            if valid is not None:
                masks[described.modality] = valid.to(device)
            streams[described.modality] = Stream(
                timed,
                untimed,
                None if untimed_valid is None else untimed_valid.to(device),
                described.modality in self.listeners,
            )
        adapters = {self.batch.towers[tower].modality: offer.adapters[name] for tower, offer in offers.items()}
        some = next(iter(adapters.values()))
        vision = adapters.get("vision")
        messages, importance = interact(
            streams,
            self._plan(streams, masks, some, device),
            num_heads=some.num_heads,
            frame_filter=None if vision is None else vision.judge,
        )
        if importance is not None:
            self.importance.setdefault(name, []).append(importance.detach())
            names = next(offer.names for tower, offer in offers.items() if self._modality(tower) == "vision")
            self._leave_importance(importance, None if names is None else [each == name for each in names])
        return {tower: messages[self.batch.towers[tower].modality] for tower in offers}

    def _modality(self, tower: str) -> str:
        return self.batch.towers[tower].modality

    def _leave_importance(self, importance: Tensor, samples: list[bool] | None) -> None:
        """Leave the importance of frames at this level for pooling; that of adapters acting together multiplies."""
        if samples is not None and len(samples) == len(importance):  # the layers refuse another number
            importance = importance.where(torch.tensor(samples, device=importance.device)[:, None], 1.0)
        before = self.batch.importance.get("vision")
        self.batch.importance["vision"] = importance if before is None else before * importance

    def _times(self, steps: Mapping[str, int]) -> dict[str, Tensor]:
        """By tower, from when to when each of its time steps is; empty unless that is known of pictures and sound."""
        described = {each.modality: each for each in self.batch.towers.values()}
        times = {modality: described[modality].step_times(count) for modality, count in steps.items()}
        known = {modality: each for modality, each in times.items() if each is not None}
        return known if {"vision", "audio"} <= known.keys() else {}

    def _plan(
        self, streams: Mapping[str, Stream], masks: Mapping[str, Tensor], adapter: LsttaAdapter, device: torch.device
    ) -> Windows:
        """The windows of this batch, planned once for all levels at which the towers have as many time steps."""
        steps = {tower: stream.timed.shape[1] for tower, stream in streams.items() if stream.timed is not None}
        key = (*steps.items(), adapter.window, adapter.num_audio_windows)
        if key not in self.plans:
            self.plans[key] = plan_windows(
                steps,
                masks,
                batch=self.batch.size,
                window=adapter.window,
                num_audio_windows=adapter.num_audio_windows,
                device=device,
                times=self._times(steps),
            )
        return self.plans[key]
