"""The model, and what is adapted in it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)

import peft_read
from peft_read.architectures.targets import default_targets, owner_of
from peft_read.forward.frames import takes_grid


TOWERS = ("language", "vision", "both")
VISION = "vision"  # the adapter beside the default one
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "read": {"cell": "gru"},
    "lora": {"r": 16, "lora_alpha": 32},
}


def load_processor(name: str) -> ProcessorMixin:
    """The processor of a model, which must have a chat template.

    Raises:
        SystemExit: if it can't be made or has none.
    """
    try:
        processor = AutoProcessor.from_pretrained(name)
    except ImportError as error:
        raise SystemExit(f"The processor of {name} needs more packages: {error}") from error
    if getattr(processor, "chat_template", None) is None:
        raise SystemExit(f"{name} has no chat template: --model wants an instruction-tuned video language model.")
    return processor


def load_model(
    name: str, *, load_in: str | None = None, dtype: str = "auto", attention: str | None = None
) -> PreTrainedModel:
    """The model to adapt.

    Args:
        name: a folder or a hub id.
        load_in: `"4bit"` or `"8bit"`: its linear layers quantised by bitsandbytes.
        dtype: of its weights, such as `"bfloat16"`; the checkpoint's own by default.
        attention: transformers' name of the attention implementation.
    """
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    if load_in is not None:
        computed = torch.bfloat16 if dtype == "auto" else options["dtype"]
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
            if load_in == "4bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    return AutoModelForImageTextToText.from_pretrained(name, **options)


def check_quantisation(load_in: str | None) -> None:
    """Refuse to quantise without the library for it, before anything is loaded."""
    if load_in is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise SystemExit(f"--load_in {load_in} needs bitsandbytes: pip install bitsandbytes")


def check_method(method: str, fields: dict[str, Any], adapt: str) -> None:
    """Refuse a method, or a field of its config, that there isn't, before anything is loaded."""
    known = _known_fields(method)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise SystemExit(f"--method_config: --method {method} has no {unknown[0]!r}.")
    if adapt != "language" and "target_modules" not in known:
        raise SystemExit(f"--method {method} adapts the model as a whole: leave --adapt out.")
    _make(method, METHOD_DEFAULTS.get(method, {}) | fields)


def adapt_model(
    model: PreTrainedModel, method: str, fields: dict[str, Any], adapt: str, *, frames: int | None, seed: int
) -> PeftModel:
    """Freeze a model and add an adapter of a PEFT method to it.

    Args:
        model: the model.
        method: name of a PEFT method.
        fields: of the method's config; targets among them count instead of `adapt`.
        adapt: which towers are adapted. READ recurs over tokens in the language tower and over frames in the vision
            tower; where it adapts both, there are two adapters, `"default"` and `"vision"`.
        frames: of every video, None if they differ.
        seed: of the new weights.
    """
    set_seed(seed)
    if getattr(model, "hf_quantizer", None) is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if method != "read" or adapt != "both" or "target_modules" in fields:
        return get_peft_model(model, _config(model, method, fields, adapt, frames))
    first, second = (_config(model, method, fields, tower, frames) for tower in ("language", "vision"))
    adapted = get_peft_model(model, first)
    adapted.add_adapter(VISION, second)
    _activate_all(adapted)
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A saved adapter on its model; with the vision tower's beside it, if there is one."""
    adapted = PeftModel.from_pretrained(model, folder)
    if (folder / VISION / "adapter_config.json").is_file():
        adapted.load_adapter(folder / VISION, VISION)
        _activate_all(adapted)
    return adapted.eval()


def _activate_all(model: PeftModel) -> None:
    """Let all adapters of a model run at once."""
    model.base_model.set_adapter(list(model.peft_config))


def _config(model: PreTrainedModel, method: str, fields: dict[str, Any], adapt: str, frames: int | None) -> PeftConfig:
    """A method's config, with targets in a tower where the user names none."""
    known, fields = _known_fields(method), METHOD_DEFAULTS.get(method, {}) | fields
    if "target_modules" in known and "target_modules" not in fields:
        ends = [name for tower in (TOWERS[:2] if adapt == "both" else (adapt,)) for name in tower_ends(model, tower)]
        fields["target_modules"] = ends if method == "read" else _linear_layers_around(model, ends)
        if "feedforward_modules" in known:
            fields.setdefault("feedforward_modules", ends)
        if method == "read" and adapt == "vision" and fields.get("cell") != "none":
            fields |= {"recur_over": "frames"} | _number_of_frames(model, ends, frames)
    return _make(method, fields)


def _number_of_frames(model: PreTrainedModel, ends: list[str], frames: int | None) -> dict[str, Any]:
    """What READ must be told of the frames of each video."""
    if takes_grid(owner_of(model, ends[0])):
        return {}
    if frames is None:
        raise SystemExit(
            "READ in this vision tower wants as many frames of every video: --max_frames N and an --fps so high that "
            "each video has them, such as 100."
        )
    return {"num_frames": frames}


def tower_ends(model: PreTrainedModel, tower: str) -> list[str]:
    """Where the feed-forward parts of the blocks of a tower, `"language"` or `"vision"`, end."""
    language = default_targets(model)
    if tower == "language":
        return language
    others = [name for name in peft_read.find_feed_forward_outputs(model) if name not in language]
    sees = [name for name in others if "audio" not in getattr(owner_of(model, name), "input_modalities", ())]
    if not sees:
        raise SystemExit(f"--adapt {tower}: {type(model).__name__} has no blocks of a tower that sees.")
    return sees


def _linear_layers_around(model: PreTrainedModel, ends: list[str]) -> list[str]:
    """All linear layers of the towers that some modules lie in."""
    towers = {owner_of(model, name) for name in ends}
    inside = {module for tower in towers for module in tower.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if module in inside]


def _known_fields(method: str) -> set[str]:
    try:
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    except (KeyError, ValueError) as error:
        raise SystemExit(f"--method {method} is no PEFT method; try read, lora or ia3.") from error
    return {field.name for field in dataclasses.fields(config_class)}


def _make(method: str, fields: dict[str, Any]) -> PeftConfig:
    task = {} if "target_modules" in _known_fields(method) else {"task_type": "CAUSAL_LM"}  # prompts need to know
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())](**task, **fields)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--method_config doesn't fit --method {method}: {error}") from error
