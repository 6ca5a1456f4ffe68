"""Towers from the Hub, from folders and out of larger models, with the checkpoint's weights or not at all."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel


# By modality, names of the main input of towers that fit.
MAIN_INPUTS = {
    "vision": ("pixel_values", "pixel_values_videos", "frame_features"),
    "audio": ("input_values", "input_features"),
    "text": ("input_ids", "inputs_embeds"),
}


def load_tower(modality: str, source: str | os.PathLike[str] | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A tower from the Hub, a folder, or a model: of composites the side for the modality, of others the encoder.

    A name is tried the cheap way first, the tower alone out of the checkpoint; a checkpoint that names the tower's
    weights in another way is loaded as the model that it was saved from, and the tower is taken out of that. A pooling
    layer, which isn't used here, and the embedding of masked steps (wav2vec2) are left out where the checkpoint has
    none.

    Args:
        modality: `"vision"`, `"audio"` or `"text"`.
        source: id of a model on the Hub, path of a folder, or a model, which is used and not copied.
        kwargs: passed to `from_pretrained`, where there is something to load.

    Raises:
        TypeError: if `source` is neither.
        ValueError: if there is no such tower, or the checkpoint lacks some of its weights.
    """
    if isinstance(source, PreTrainedModel):
        return part_for(modality, source)[1]
    _check_source(modality, source)
    config = AutoConfig.from_pretrained(source)
    missing: list[str] = []
    for attempt in (_alone, _renamed, _out_of_the_whole):
        loaded = attempt(modality, source, config, kwargs)
        if loaded is None:
            continue
        tower, missing = loaded
        if not missing:
            return tower
    if not missing:
        raise ValueError(f"{source}, a {type(config).__name__}, has no {modality} tower that could stand alone.")
    raise ValueError(
        f"{source} lacks {len(missing)} of the {modality} tower's weights ({', '.join(missing[:3])}"
        f"{', ...' if len(missing) > 3 else ''}), which would be random. Name a checkpoint that has them, or load a "
        "complete model yourself and give that."
    )


def load_language_model(source: str | os.PathLike[str] | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """An encoder-decoder that reads and writes text, from the Hub, a folder, or a model, which isn't copied.

    Raises:
        TypeError: if `source` is neither.
        ValueError: if it is another kind of model, or the checkpoint lacks some of its weights.
    """
    model = source if isinstance(source, PreTrainedModel) else _load_language_model(source, kwargs)
    if not (model.config.is_encoder_decoder and model.can_generate() and model.main_input_name == "input_ids"):
        raise ValueError(_no_language_model(f"A {type(model).__name__}"))
    return model


def _load_language_model(source: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    _check_source("text", source)
    config = AutoConfig.from_pretrained(source)
    if not config.is_encoder_decoder:
        raise ValueError(_no_language_model(f"{source}, a {type(config).__name__},"))
    model: PreTrainedModel
    with _quiet():
        model, report = AutoModelForSeq2SeqLM.from_pretrained(source, output_loading_info=True, **kwargs)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__} ({', '.join(missing[:3])}), which "
            "would be random. Name a checkpoint that has them."
        )
    return model


def _no_language_model(what: str) -> str:
    return (
        f"{what} is no encoder-decoder that generates text: give one such as T5ForConditionalGeneration or "
        "BartForConditionalGeneration as `text`."
    )


def part_for(modality: str, model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The tower for a modality in a model, and its name there, "" for the model itself.

    Raises:
        ValueError: if it has none.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    tower = _part_for(modality, model)
    if tower is None or tower not in names:
        raise ValueError(f"A {type(model).__name__} has no {modality} tower that could stand alone.")
    return names[tower], tower


def _part_for(modality: str, model: PreTrainedModel) -> PreTrainedModel | None:
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    side = side_config(modality, model.config)
    if side is not None:
        own = [module for module in inner if module.config is side]
        own = own or [module for module in inner if type(module.config) is type(side)]
        return _headless(own[0]) if own else None
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        return encoder if isinstance(encoder, PreTrainedModel) and _fits(modality, encoder) else None
    base = _headless(model)
    if _fits(modality, base):
        return base
    others = (module for module in inner if type(module.config) is not type(model.config))
    return next((module for module in others if _fits(modality, module)), None)


def _headless(model: PreTrainedModel) -> PreTrainedModel:
    base = model.base_model if re.search(r"For[A-Z]|LMHead", type(model).__name__) else model
    assert isinstance(base, PreTrainedModel)
    return base


def side_config(modality: str, config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A composite's configuration of one modality, if it has one."""
    side = getattr(config, f"{modality}_config", None)
    return side if isinstance(side, PreTrainedConfig) else None


def _fits(modality: str, model: PreTrainedModel) -> bool:
    return model.main_input_name in MAIN_INPUTS[modality]


def _check_source(modality: str, source: Any) -> None:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"The {modality} tower must be a model of transformers, or the id or path of one, got a "
            f"{type(source).__name__}. Adapters are added to the whole model."
        )


Loaded = tuple[PreTrainedModel, list[str]] | None


def _alone(modality: str, source: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> Loaded:
    """The tower by the names that its own class gives its weights."""
    side = side_config(modality, config)
    if side is not None:
        cls = class_beside(side, type(side).__name__.replace("Config", "Model"))
        return None if cls is None else _load(cls, source, side, kwargs)
    if config.is_encoder_decoder and config.model_type in ("t5", "mt5", "umt5"):
        return _load(
            class_beside(config, type(config).__name__.replace("Config", "EncoderModel")), source, None, kwargs
        )
    return _taken_out(modality, AutoModel, source, kwargs) if type(config) in AutoModel._model_mapping else None


def _renamed(modality: str, source: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> Loaded:
    """The tower alone, by the names that its weights have in the model that was saved."""
    cls = _saved_class(config)
    if cls is None:
        return None
    try:
        with torch.device("meta"):
            prefix, part = part_for(modality, cls(config))
    except (ValueError, NotImplementedError, RuntimeError):  # some models can't be built without memory
        return None
    if not prefix:
        return None
    # Composites save their base model's parts with and without its own name in front.
    names = {
        rf"^({re.escape(cls.base_model_prefix)}\.)?{re.escape(prefix.removeprefix(cls.base_model_prefix + '.'))}\.": ""
    }
    try:
        return _load(type(part), source, part.config, kwargs | {"key_mapping": names})
    except (RuntimeError, ValueError):
        return None


def _out_of_the_whole(modality: str, source: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> Loaded:
    """The tower out of the model that was saved."""
    cls = _saved_class(config) or (AutoModel if type(config) in AutoModel._model_mapping else None)
    return None if cls is None else _taken_out(modality, cls, source, kwargs)


def _saved_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    found = getattr(transformers, (config.architectures or [""])[0] or "-", None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _load(cls: Any, source: Any, config: PreTrainedConfig | None, kwargs: dict[str, Any]) -> Loaded:
    """A model of a class, and what the checkpoint lacks of it; without what it may do without."""
    chosen = {} if config is None else {"config": config}
    with _quiet():
        model, report = cls.from_pretrained(source, output_loading_info=True, **chosen, **kwargs)
        missing = sorted(report["missing_keys"])
        less = _without(type(model), model.config, missing)
        if less is not None:
            return _load(cls, source, None, kwargs | less)
    return model, missing


def _taken_out(modality: str, cls: Any, source: Any, kwargs: dict[str, Any]) -> Loaded:
    loaded = _load(cls, source, None, kwargs)
    assert loaded is not None
    model, missing = loaded
    try:
        prefix, tower = part_for(modality, model)
    except ValueError:
        return None
    inside = f"{prefix}." if prefix else ""
    return tower, [name.removeprefix(inside) for name in missing if name.startswith(inside)]


def _without(cls: type[PreTrainedModel], config: PreTrainedConfig, missing: list[str]) -> dict[str, Any] | None:
    """Options with which a model is built without what is missing; None if some of that is needed."""
    options: dict[str, Any] = {}
    for name in missing:
        if name.startswith("pooler.") and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
            options["add_pooling_layer"] = False
        elif name == "masked_spec_embed":  # without it, steps aren't masked at random in training
            options |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
        else:
            return None
    return options or None


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights, of the class that its configuration names first in `architectures`."""
    name = (config.architectures or [""])[0]
    cls = None if "For" in name else class_beside(config, name)  # one with a head names what it was pretrained as
    if cls is None:
        return AutoModel.from_config(config)
    without = {} if getattr(config, "add_pooling_layer", True) else {"add_pooling_layer": False}
    return cls(config, **without)


def build_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder-decoder with random weights, of the class that its configuration names first in `architectures`."""
    cls = class_beside(config, (config.architectures or [""])[0])
    return AutoModelForSeq2SeqLM.from_config(config) if cls is None else cls(config)


def note_class(tower: PreTrainedModel) -> None:
    """Write into a tower's configuration what `build_tower` has to know of it."""
    tower.config.architectures = [type(tower).__name__]
    options = inspect.signature(type(tower).__init__).parameters
    if "add_pooling_layer" in options and getattr(tower, "pooler", tower) is None:
        tower.config.add_pooling_layer = False


def class_beside(config: PreTrainedConfig, name: str) -> type[PreTrainedModel] | None:
    """A model class that stands beside a configuration's, by its name."""
    try:
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        return None
    found = getattr(module, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of weights that it didn't find: they are looked at here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
