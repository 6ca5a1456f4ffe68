"""Single towers: what a tower has to be called with, and what comes out of it."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..lockstep.layouts import layout_of, takes_videos


# By `model_type`: what to call a tower with besides its inputs.
ARGUMENTS: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    # It would predict masked parts from the others.
    "vjepa2": lambda config, inputs: {"skip_predictor": True},
    # No sound here is longer than what the tower hears at once: longer sound comes in segments.
    "clap_audio_model": lambda config, inputs: (
        {"is_longer": torch.zeros(len(inputs), 1, dtype=torch.bool, device=inputs.device)}
        if config.enable_fusion
        else {}
    ),
}
# By `model_type`: audio towers whose mask is one of their tokens, not of their input.
MASK_OF_TOKENS = ("audio-spectrogram-transformer", "qwen2_audio_encoder")


def without_layerdrop(modality: str, tower: PreTrainedModel) -> None:
    """Let a tower run all of its blocks in training: a level without one of the towers is noise to the others."""
    places = [tower.config, *tower.modules()]
    found = [(place, name) for place in places for name in vars(place) if re.fullmatch(r"(encoder_)?layerdrop", name)]
    dropping = {name for place, name in found if getattr(place, name)}
    for place, name in found:
        setattr(place, name, 0.0)
    if dropping:
        warnings.warn(
            f"The {modality} tower would leave out blocks at random in training ({', '.join(sorted(dropping))}); this "
            "is switched off, as the towers are to meet at every level.",
            stacklevel=3,
        )


def tower_inputs(tower: PreTrainedModel, inputs: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """What to call a tower with.

    Args:
        tower: the tower.
        inputs: as the composite model takes them; `(batch, frames, channels, height, width)` for vision, and in place
            of text tokens possibly their embeddings.
        mask: `(rows, input steps)`, bool, true where real; passed on if the tower takes one for sound or text.

    Returns:
        Keyword arguments of its forward. Samples without anything real look to the tower as if all were: some make NaN
        of nothing.
    """
    if inputs.is_floating_point():
        inputs = inputs.to(tower.dtype)
    name = tower.main_input_name
    if name == "input_ids" and inputs.is_floating_point():
        name = "inputs_embeds"
    pictures = inputs.ndim == 5
    if pictures and not takes_videos(tower):
        inputs = inputs.flatten(0, 1)
    arguments: dict[str, Any] = {name: inputs}
    if (more := ARGUMENTS.get(tower.config.model_type)) is not None:
        arguments |= more(tower.config, inputs)
    if mask is not None and not pictures and _takes_mask(tower):
        arguments["attention_mask"] = (mask | ~mask.any(1, keepdim=True)).long()
    return arguments


def sound_steps(tower: PreTrainedModel, sound: Tensor) -> int:
    """How many steps a sound has: samples of a waveform, or frames of a spectrogram, whichever axis they are on."""
    if sound.ndim == 2:
        return sound.shape[1]
    mels = getattr(tower.config, "num_mel_bins", None)
    mels_first = sound.ndim == 3 and sound.shape[1] == mels != sound.shape[2]
    return sound.shape[-1 if mels_first else -2]


def tokens_of(tower: PreTrainedModel, output: Any) -> Tensor:
    """`(rows, tokens, width)` or a grid of tokens, of a tower's output, in the order that they have in its blocks."""
    hidden: Tensor = output.last_hidden_state
    width = tower_width(tower)
    if hidden.ndim != 4:
        return hidden
    if tower.config.model_type == "clap_audio_model":  # it puts the pieces of the time axis side by side at its end
        pieces = layout_of(tower, "audio", 1).pieces
        return hidden.unflatten(-1, (pieces, -1)).permute(0, 3, 2, 4, 1).flatten(1, 3)
    convolves = getattr(tower.config, "hidden_sizes", None) is not None
    if hidden.shape[1] == width and (convolves or hidden.shape[-1] != width):
        return hidden.flatten(2).transpose(1, 2)
    return hidden


def tower_width(tower: PreTrainedModel) -> int:
    """Size of a tower's last hidden states.

    Raises:
        ValueError: if its configuration doesn't tell.
    """
    config = tower.config
    width = config.output_hidden_size if getattr(config, "add_adapter", False) else None
    width = width or getattr(config, "hidden_size", None)
    if width is None and getattr(config, "hidden_sizes", None):  # convolutions
        width = config.hidden_sizes[-1]
    if width is None:
        raise ValueError(
            f"A {type(tower).__name__} can't be a tower: its {type(config).__name__} has neither `hidden_size` nor "
            "`hidden_sizes`, so the size of its last hidden states isn't known. Set `hidden_size` to it."
        )
    return int(width)


def _takes_mask(tower: PreTrainedModel) -> bool:
    # Those were pretrained without, and see silence in place of padding; or their mask is one of tokens, not of sound.
    without = getattr(tower.config, "feat_extract_norm", "") == "group" or tower.config.model_type in MASK_OF_TOKENS
    return not without and "attention_mask" in inspect.signature(tower.forward).parameters
