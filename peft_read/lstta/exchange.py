"""The meeting of the towers at each level: sorts what their blocks bring by time, and lets it interact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..lockstep.composite import Exchange, LockstepBatch
from .adapter import LsttaAdapter
from .interaction import Messages, Stream, interact
from .windows import Windows, plan_windows


@dataclass(frozen=True)
class Offer:
    """What a block brings to a meeting.

    Attributes:
        adapters: by name, the block's adapters that act in this forward.
        projections: by name, what each made of the hidden states: `(rows, tokens, 3 * r)`.
    """

    adapters: dict[str, LsttaAdapter]
    projections: dict[str, Tensor]


class LsttaExchange:
    """What LSTTA sets as `make_exchange` of the composite model.

    Blocks can't meet inside of a part that is checkpointed as a whole, such as a stage of a Swin, because the towers
    won't meet again when it is recomputed: checkpointing of such parts is switched off, not that of their blocks.

    Attributes:
        importance: by adapter, importance of the frames at each level of the last forward, `(batch, time steps)` each.
        stages: the parts around adapted blocks that could be checkpointed as a whole.
    """

    def __init__(self) -> None:
        self.importance: dict[str, list[Tensor]] = {}
        self.stages: list[GradientCheckpointingLayer] = []
        self._switched_off: list[GradientCheckpointingLayer] = []

    def __call__(self, batch: LockstepBatch) -> Exchange:
        """The exchange of one forward."""
        for stage in self.stages:
            if stage.gradient_checkpointing:
                stage.gradient_checkpointing = False
                self._switched_off.append(stage)
        self.importance = {}
        return _Forward(batch, self.importance).serve

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
    plans: dict[tuple[object, ...], Windows] = field(default_factory=dict)

    def serve(self, level: int, offers: dict[str, Offer]) -> dict[str, dict[str, Tensor]]:
        """By tower and adapter, what the tokens of each block are told: `(rows, tokens, r)`."""
        if len(self.batch.towers) < 2:
            raise ValueError(
                f"LSTTA lets modalities interact, but this batch has only {', '.join(self.batch.towers)}. Give inputs "
                "of two or three modalities, or use `disable_adapter()` to run the base model."
            )
        replies: dict[str, dict[str, Tensor]] = {tower: {} for tower in offers}
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
                timed, untimed, None if untimed_valid is None else untimed_valid.to(device)
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
        return {tower: messages[self.batch.towers[tower].modality] for tower in offers}

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
            )
        return self.plans[key]
