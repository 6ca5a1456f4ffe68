"""Adapters of other methods inside of an adapted model: LoRA or READ in a tower, and LSTTA between the towers.

PEFT saves and loads the adapters of one method. The others live in the part of the model that they adapt, into which
`inject_adapter_in_model(config, part)` puts them before the model is adapted as a whole. They are saved beside, in a
folder of the part's name, and loaded before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .fitting import PEFT_PREFIX


# Not as PEFT names an adapter's: a Trainer that resumes would take the folder for one more adapter of the whole model.
WEIGHTS = "inner_model.safetensors"
HOW = (
    "Put it into the part of the model that it adapts, before the model is adapted as a whole: "
    "`inject_adapter_in_model(config, model.text_model)`, say."
)


def folder_of(part: str, name: str) -> str:
    """Where an adapter inside of a part is saved: transformers' `push_to_hub` takes no folders within folders."""
    return f"inner.{part}.{name}"


def check_inner_adapters(model: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
    """Refuse adapters in a model that couldn't be saved with those of the model as a whole.

    Args:
        model: the base model with its layers.
        configs: by name, the adapters of the model as a whole.

    Raises:
        ValueError: if there are such adapters; the message names where.
    """
    parts = dict(_parts(model))
    for name, module in model.named_modules():
        if isinstance(module, PeftModel):
            raise ValueError(f"{name} is a PeftModel of its own, which isn't saved with the model around it. {HOW}")
        if not isinstance(module, BaseTunerLayer) or ".token_adapter" in name:
            continue
        found = {key for part in module.adapter_layer_names for key in getattr(module, part)}
        around = [each.peft_config for part, each in parts.items() if f"{name}.".startswith(f"{part}.")]
        known = {
            key
            for named in [configs, *around]
            for key, config in named.items()
            if isinstance(module, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls)
        }
        lost = found - known
        if lost:
            raise ValueError(
                f"The adapter {sorted(lost)[0]!r} in {name}, a {type(module).__name__}, would be in no file. {HOW}"
            )
    for part, module in parts.items():
        for key, config in module.peft_config.items():
            beside = [f for f in ("modules_to_save", "trainable_token_indices") if getattr(config, f, None)]
            if beside or getattr(config, "bias", "none") != "none":
                raise ValueError(
                    f"The adapter {key!r} in {part} trains more than itself ({', '.join(beside) or 'bias'}), which "
                    "can't be told apart in the model around it. Leave that to the configuration of the whole model."
                )


def inner_adapters(model: PeftModel) -> dict[str, list[str]] | None:
    """By the names of parts of a base model, the adapters that they hold of their own; None if there are none.

    Raises:
        ValueError: if adapters inside it couldn't be saved.
    """
    base = model.get_base_model()
    check_inner_adapters(base, model.peft_config)
    return {name: list(module.peft_config) for name, module in _parts(base)} or None


def save_inner_adapters(model: PeftModel, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Save the adapters inside of a model, each in a folder of its own beside the model's."""
    base = model.get_base_model()
    for part, module in _parts(base):
        given = None
        if state_dict is not None:
            front = f"{PEFT_PREFIX}{part}."
            given = {key.removeprefix(front): value for key, value in state_dict.items() if key.startswith(front)}
        for name, config in module.peft_config.items():
            place = folder / folder_of(part, name)
            place.mkdir(parents=True, exist_ok=True)
            weights = _weights(module, name, given)
            save_file(
                {key: value.detach().contiguous() for key, value in weights.items()},
                place / WEIGHTS,
                metadata={"format": "pt"},
            )
            config.save_pretrained(str(place))


def load_inner_adapters(
    base: nn.Module, source: Any, saved: Mapping[str, list[str]], download: dict[str, Any], is_trainable: bool
) -> None:
    """Put the adapters that were saved inside of a model where they were, or their weights where they are.

    Args:
        base: the base model.
        source: the folder or the repository of the adapter of the model as a whole.
        saved: by part of the model, the names of its adapters.
        download: arguments of the download, and the adapter's own `subfolder`.
        is_trainable: whether they will be trained.

    Raises:
        ValueError: if the base has no such part, or the weights don't fit.
    """
    above = download.pop("subfolder", None)
    for part, names in saved.items():
        try:
            module = base.get_submodule(part)
        except AttributeError:
            raise ValueError(f"The adapter was saved with others in {part}, which this base model hasn't.") from None
        for name in names:
            subfolder = "/".join(filter(None, [above, folder_of(part, name)]))
            config = PeftConfig.from_pretrained(source, subfolder=subfolder, **download)
            path = Path(source, subfolder, WEIGHTS)
            if not path.parent.is_dir():
                path = Path(hf_hub_download(str(source), WEIGHTS, subfolder=subfolder, **download))
            weights = load_file(path)
            if name not in getattr(module, "peft_config", {}):
                config.inference_mode = not is_trainable
                inject_adapter_in_model(config, module, name)
                if not is_trainable:
                    module.requires_grad_(False)
            _set_weights(module, name, weights)


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parts of a model, not the model itself, into which adapters were injected."""
    for name, module in model.named_modules():
        if name and module.__dict__.get("peft_config") and not isinstance(module, (BaseTuner, PeftModel)):
            yield name, module


def _around(module: nn.Module, inner: type[BaseTunerLayer]) -> list[str]:
    """Names of the layers of other methods in a part."""
    return [n for n, m in module.named_modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, inner)]


def _weights(module: Any, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An adapter's weights in a part, by their keys before the model around was adapted."""
    inner = PEFT_TYPE_TO_TUNER_MAPPING[module.peft_config[name].peft_type].tuner_layer_cls
    own = tuple(f"{n}." for n, m in module.named_modules() if isinstance(m, inner))
    others = _around(module, inner)
    weights = get_peft_model_state_dict(module, state_dict, adapter_name=name, save_embedding_layers=False)
    found = {}
    for key, value in weights.items():
        if key.startswith(own):
            for other in others:
                key = key.replace(f"{other}.base_layer.", f"{other}.", 1)
            found[key] = value
    return found


def _set_weights(module: Any, name: str, weights: Mapping[str, Tensor]) -> None:
    inner = PEFT_TYPE_TO_TUNER_MAPPING[module.peft_config[name].peft_type].tuner_layer_cls
    given = {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
    expected = _weights(module, name)
    wrong = sorted(set(given) ^ set(expected))
    wrong += [key for key in given if key in expected and given[key].shape != expected[key].shape]
    if wrong:
        raise ValueError(
            f"The weights of the adapter {name!r} in a {type(module).__name__} don't fit, so nothing was loaded. "
            f"Missing, unexpected or of another shape: {wrong[0]}"
        )
    renamed = {}
    for key, value in given.items():
        for other in _around(module, inner):
            if key.startswith(f"{other}."):
                key = f"{other}.base_layer.{key.removeprefix(f'{other}.')}"
        renamed[key] = value
    set_peft_model_state_dict(module, renamed, name)
