"""What a trimodal model is called with: checked against its towers, and described to whoever lets these exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..lockstep.batch import LockstepBatch, TowerBatch
from ..lockstep.composite import MODALITIES
from .towers import sound_steps


# By modality, the arguments that hold its input, of which one is given.
INPUTS = {
    "vision": ("pixel_values", "frame_features"),
    "audio": ("input_values", "input_features"),
    "text": ("input_ids", "inputs_embeds"),
}
MASKS = {"vision": "frame_mask", "audio": "audio_mask", "text": "attention_mask"}
TIMES = {"vision": "frame_times", "audio": "audio_times"}


@dataclass(frozen=True)
class TrimodalInputs:
    """The inputs of [`TrimodalModel.forward`], by their names there."""

    pixel_values: Tensor | None = None
    frame_mask: Tensor | None = None
    frame_times: Tensor | None = None
    frame_features: Tensor | None = None
    input_values: Tensor | None = None
    input_features: Tensor | None = None
    audio_mask: Tensor | None = None
    audio_times: Tensor | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None

    def only(self, modalities: Sequence[str]) -> Self:
        """The inputs of these modalities alone."""
        others = [modality for modality in MODALITIES if modality not in modalities]
        names = [name for modality in others for name in (*INPUTS[modality], MASKS[modality], TIMES.get(modality))]
        return dataclasses.replace(self, **{name: None for name in names if name})

    def described(self, towers: Mapping[str, PreTrainedModel]) -> tuple[dict[str, Tensor], LockstepBatch]:
        """By modality, the inputs that there are, and their description.

        Args:
            towers: by modality, those of the model.

        Returns:
            Sound in segments has these as rows, `(batch * segments, ...)`.

        Raises:
            ValueError: if inputs don't fit each other or the towers, or there are none.
        """
        inputs = {}
        for modality in MODALITIES:
            value = self._input(modality, towers.get(modality))
            if value is not None:
                inputs[modality] = value
        sizes = {modality: len(value) for modality, value in inputs.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"Give pictures, sound or text, of the same number of samples; got {sizes or 'nothing'}.")
        timed = {modality: getattr(self, name) is not None for modality, name in TIMES.items() if modality in inputs}
        if len(set(timed.values())) > 1:
            raise ValueError(
                "Give both `frame_times` and `audio_times`, or neither: pictures and sound can't be brought together "
                "by the times of one of them alone."
            )
        batch = LockstepBatch(next(iter(sizes.values())), {})
        for modality, value in inputs.items():
            mask = getattr(self, MASKS[modality])
            times = getattr(self, TIMES[modality]) if modality in TIMES else None
            segments = 1
            if modality == "audio" and any(each is not None and each.ndim == 3 for each in (mask, times)):
                segments = value.shape[1]
                inputs[modality] = value = value.flatten(0, 1)
                mask = mask[:, 0] if mask is not None and mask.ndim == 3 and segments == 1 else mask
            steps = sound_steps(towers[modality], value) if modality == "audio" else value.shape[1]
            batch.towers[modality] = TowerBatch.of(
                modality, towers[modality], batch.size, steps, mask, times, segments
            )
        return inputs, batch

    def _input(self, modality: str, tower: PreTrainedModel | None) -> Tensor | None:
        """The input of a modality, None if there is none."""
        given = {name: value for name in INPUTS[modality] if (value := getattr(self, name)) is not None}
        if not given:
            beside = {"a mask": MASKS[modality], "times": TIMES.get(modality)}
            for what, name in beside.items():
                if name and getattr(self, name) is not None:
                    raise ValueError(
                        f"There is {what} for the {modality} tower, but no input.".replace("is times", "are times")
                    )
            return None
        if tower is None:
            raise ValueError(f"This model has no {modality} tower, but was given {list(given)}.")
        if len(given) > 1:
            raise ValueError(f"Give either of {list(given)}, not both.")
        ((name, value),) = given.items()
        expected = tower.main_input_name
        if modality == "vision":  # video towers have another name for their pixels
            expected = "frame_features" if expected == "frame_features" else "pixel_values"
        if modality != "text" and name != expected:
            raise ValueError(f"A {type(tower).__name__} takes `{expected}`, not `{name}`.")
        if name == "pixel_values" and value.ndim != 5:
            raise ValueError(
                f"`pixel_values` must be (batch, frames, channels, height, width), got shape {tuple(value.shape)}."
            )
        return value

    def repeated(self, times: int) -> Self:
        """The same with each sample's pictures and sound `times` times in a row, for as many texts."""
        names = [name for m in TIMES for name in (*INPUTS[m], MASKS[m], TIMES[m])]
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **{n: value.repeat_interleave(times, 0) for n, value in values.items()})


def drop_modalities(batch: LockstepBatch, probability: float, needed: Sequence[str]) -> None:
    """Mask whole modalities out of random samples.

    Args:
        batch: what runs through the towers; their masks are replaced.
        probability: with which a sample loses a modality, each by itself; a sample that would lose all keeps them.
        needed: modalities that no sample loses.
    """
    device = next(next(iter(batch.towers.values())).tower.parameters()).device
    lost, left = {}, torch.zeros(batch.size, dtype=torch.bool, device=device)
    for modality, part in batch.towers.items():
        present = torch.ones(batch.size, dtype=torch.bool, device=device)
        if part.mask is not None:
            present = part.mask.flatten(1).any(1).to(device)
        drawn = torch.rand(batch.size, device=device) < (0.0 if modality in needed else probability)
        lost[modality] = drawn
        left |= present & ~drawn
    for modality, part in batch.towers.items():
        if modality in needed:
            continue
        mask = part.mask
        if mask is None:
            shape = (batch.size, part.segments, part.steps) if part.segments > 1 else (batch.size, part.steps)
            mask = torch.ones(shape, dtype=torch.bool, device=device)
        kept = ~(lost[modality] & left).to(mask.device)
        batch.towers[modality] = dataclasses.replace(
            part, mask=mask & kept[(...,) + (None,) * (mask.ndim - 1)], _masks={}
        )
