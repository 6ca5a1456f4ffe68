"""Single towers: loading them from anywhere, building them again, and what a tower has to be called with."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..lockstep.layouts import takes_videos


# By `model_type`: what to call a tower with besides its inputs.
ARGUMENTS: dict[str, dict[str, Any]] = {"vjepa2": {"skip_predictor": True}}  # predicts masked parts from the others


def load_tower(modality: str, source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A tower from the Hub, a folder, or a model: of dual encoders the side for the modality, of others the encoder.

    Args:
        modality: `"vision"`, `"audio"` or `"text"`.
        source: id of a model on the Hub, path of a folder, or a model.
        kwargs: passed to `from_pretrained`, where there is something to load.
    """
    if isinstance(source, PreTrainedModel):
        with_head = "For" in type(source).__name__
        model: Any = source.base_model if with_head else source
        if isinstance(getattr(model.config, f"{modality}_config", None), PreTrainedConfig):
            model = getattr(model, f"{modality}_model", None)
        elif model.config.is_encoder_decoder:
            model = model.get_encoder()
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"A {type(source).__name__} has no {modality} tower that could stand alone.")
        return model
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"The {modality} tower must be a model of transformers, or the id or path of one, got a "
            f"{type(source).__name__}. Adapters are added to the whole model."
        )
    config = AutoConfig.from_pretrained(source)
    side = getattr(config, f"{modality}_config", None)
    if isinstance(side, PreTrainedConfig):
        cls = _class_named(side, type(side).__name__.replace("Config", "Model")) or AutoModel
        return cls.from_pretrained(source, config=side, **kwargs)
    if config.is_encoder_decoder:
        encoder_only = _class_named(config, type(config).__name__.replace("Config", "EncoderModel"))  # T5
        if encoder_only is not None:
            return encoder_only.from_pretrained(source, **kwargs)
    return load_tower(modality, AutoModel.from_pretrained(source, **kwargs))


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights, of the class that its configuration names first in `architectures`."""
    name = (config.architectures or [""])[0]
    cls = None if "For" in name else _class_named(config, name)  # one with a head names what it was pretrained as
    return AutoModel.from_config(config) if cls is None else cls(config)


def without_layerdrop(modality: str, tower: PreTrainedModel) -> None:
    """Let a tower run all of its blocks in training: a level without one of the towers is noise to the others."""
    places = [tower.config, *tower.modules()]
    found = [(place, name) for place in places for name in vars(place) if name.endswith("layerdrop")]
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
        mask: `(batch, input steps)`, bool, true where real; passed on if the tower takes one for sound or text.

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
    arguments = {name: inputs} | ARGUMENTS.get(tower.config.model_type, {})
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


def tokens_of(output: Any, width: int) -> Tensor:
    """`(rows, tokens, width)` or a grid of tokens, of a tower's output, which may have put the width first."""
    hidden: Tensor = output.last_hidden_state
    if hidden.ndim == 4 and hidden.shape[1] == width != hidden.shape[-1]:
        return hidden.flatten(2).transpose(1, 2)
    return hidden


def tower_width(tower: PreTrainedModel) -> int:
    """Size of a tower's last hidden states."""
    config = tower.config
    width = config.output_hidden_size if getattr(config, "add_adapter", False) else config.hidden_size
    return int(width)


def _class_named(config: PreTrainedConfig, name: str) -> type[PreTrainedModel] | None:
    """A model class that stands in transformers beside a configuration's."""
    try:
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        return None
    found = getattr(module, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _takes_mask(tower: nn.Module) -> bool:
    # Those were pretrained without, and see silence in place of padding; AST's would go over patches, not over sound.
    over_patches = getattr(tower.config, "model_type", "") == "audio-spectrogram-transformer"
    without = over_patches or getattr(tower.config, "feat_extract_norm", "") == "group"
    return not without and "attention_mask" in inspect.signature(tower.forward).parameters
