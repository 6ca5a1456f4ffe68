"""Adapters of other methods inside of an adapted model: LoRA or READ in a tower, and LSTTA between the towers.

PEFT saves and loads the adapters of one method. The others live in the part of the model that they adapt, into which
`inject_adapter_in_model(config, part)` puts them before the model is adapted as a whole. They are saved beside, in a
folder of the part's name, and loaded before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import AdapterConfig
from .fitting import PEFT_PREFIX, UNRELATED, differing_fields, faults_of
from .offloading import check_weights_have_values


# Not as PEFT names an adapter's: a Trainer that resumes would take the folder for one more adapter of the whole model.
WEIGHTS = "inner_model.safetensors"
HOW = (
    "Put it into the part of the model that it adapts, before the model is adapted as a whole: "
    "`inject_adapter_in_model(config, model.text_model)`, say."
)
ELSEWHERE = (
    "It would act for all adapters of the model: load into a base model of its own, by `PeftModel.from_pretrained`."
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


def active_inner_adapters(model: PeftModel) -> dict[str, list[str]] | None:
    """By the names of parts of a base model, those of their own adapters that act; None if there are no such parts.

    Raises:
        ValueError: if an adapter acts in some layers of a part and not in others.
    """
    base = model.get_base_model()
    layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
    # `with model.disable_adapter()` switches all off, for the time of the context.
    is_off = all(layer.disable_adapters for layer in layers)
    return {name: _active(name, part, is_off) for name, part in _parts(base)} or None


def _active(part: str, module: Any, is_off: bool = False) -> list[str]:
    active = []
    for name in module.peft_config:
        acts = {
            name in layer.active_adapters and (is_off or not layer.disable_adapters)
            for layer in _layers(module, name)
            if any(name in getattr(layer, each) for each in layer.adapter_layer_names)
        }
        if len(acts) > 1:
            raise ValueError(
                f"The adapter {name!r} in {part} acts in some of its layers and not in others, which no file says. "
                "Call `set_adapter` of all its layers alike before saving."
            )
        active += [name] if True in acts else []
    return active


def save_inner_adapters(model: PeftModel, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Save the adapters inside of a model, each in a folder of its own in `folder`."""
    base = model.get_base_model()
    for part, module in _parts(base):
        given = None
        if state_dict is not None:
            front = f"{PEFT_PREFIX}{part}."
            given = {key.removeprefix(front): value for key, value in state_dict.items() if key.startswith(front)}
        for name, config in module.peft_config.items():
            place = folder / folder_of(part, name)
            place.mkdir(parents=True, exist_ok=True)
            # Layers may share weights, as RandLoRA's do, which safetensors refuses.
            weights = {
                key: value.detach().clone(memory_format=torch.contiguous_format)
                for key, value in _weights(module, name, given).items()
            }
            save_file(weights, place / WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(str(place))


@contextmanager
def inner_adapters_loaded(
    base: nn.Module, source: Any, config: AdapterConfig, download: Mapping[str, Any], is_trainable: bool
) -> Iterator[None]:
    """Put the adapters that were saved inside of a model where they were, around the loading of the model's own.

    The weights are copied when the body is done, so that what the body refuses leaves those that were there.

    Args:
        base: the base model.
        source: the folder or the repository of the adapter of the model as a whole.
        config: its configuration.
        download: arguments of the download, and the adapter's own `subfolder`.
        is_trainable: whether they will be trained.

    Raises:
        ValueError: if the base has no such part, another adapter of that name in it, or the weights don't fit.
    """
    found = _saved(base, source, config, download)
    rewritten: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for part, module, name, inner, weights in found:
            if name in getattr(module, "peft_config", {}):
                _check_same_configuration(part, name, module.peft_config[name], inner)
            else:
                if _rewrites_base(inner):
                    rewritten += [(p, p.detach().clone()) for p in module.parameters()]
                inner.inference_mode = not is_trainable
                inject_adapter_in_model(inner, module, name)
                check_weights_have_values(module)
            _check_weights(module, name, weights)
        for part, active in (config.active_inner_adapters or {}).items():
            _activate(base.get_submodule(part), active, is_trainable)
        if not is_trainable:
            for _, module, *_ in found:
                module.requires_grad_(False)
        yield
    except BaseException:
        for parameter, value in rewritten:
            parameter.data = value
        raise
    for _, module, name, _, weights in found:
        _set_weights(module, name, weights)


@contextmanager
def inner_adapters_reloaded(
    base: nn.Module, source: Any, config: AdapterConfig, download: Mapping[str, Any]
) -> Iterator[None]:
    """Copy the weights of adapters that are inside of a model already, after the body has loaded the model's own.

    Raises:
        ValueError: if they aren't there, or don't fit.
    """
    found = _saved(base, source, config, download)
    for part, module, name, inner, weights in found:
        _check_is_there(part, module, name, inner)
        _check_weights(module, name, weights)
    yield
    for _, module, name, _, weights in found:
        _set_weights(module, name, weights)


def check_inner_adapters_are_there(
    base: nn.Module, source: Any, config: AdapterConfig, download: Mapping[str, Any]
) -> None:
    """Refuse one more adapter of a model that was saved with others inside, unless the model holds the very same.

    Raises:
        ValueError: if it doesn't.
    """
    for part, module, name, inner, weights in _saved(base, source, config, download):
        _check_is_there(part, module, name, inner)
        _check_weights(module, name, weights)
        there = _weights(module, name)
        given = {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
        active = (config.active_inner_adapters or {}).get(part)
        if active is not None and set(active) != set(_active(part, module)):
            raise ValueError(
                f"The adapter was saved while {active} acted in {part}, not {_active(part, module)}. {ELSEWHERE}"
            )
        if any(not torch.equal(given[key].to(value.device, value.dtype), value) for key, value in there.items()):
            raise ValueError(f"The adapter was saved with other weights of {name!r} in {part}. {ELSEWHERE}")


def _saved(
    base: nn.Module, source: Any, config: AdapterConfig, download: Mapping[str, Any]
) -> list[tuple[str, Any, str, PeftConfig, dict[str, Tensor]]]:
    """The adapters that were saved inside of a model: part and its name, name, configuration and weights."""
    options = dict(download)
    above = options.pop("subfolder", None)
    found = []
    for part, names in (config.inner_adapters or {}).items():
        try:
            module = base.get_submodule(part)
        except AttributeError:
            raise ValueError(f"The adapter was saved with others in {part}, which this base model hasn't.") from None
        for name in names:
            subfolder = "/".join(filter(None, [above, folder_of(part, name)]))
            path = Path(source, subfolder, WEIGHTS)
            if Path(source).is_dir() and not path.is_file():
                raise ValueError(
                    f"The adapter was saved with {name!r} in {part}, but there is no {path}. Save the model again, or "
                    "copy the whole folder."
                )
            inner = PeftConfig.from_pretrained(source, subfolder=subfolder, **options)
            if not path.is_file():
                path = Path(hf_hub_download(str(source), WEIGHTS, subfolder=subfolder, **options))
            found.append((part, module, name, inner, load_file(path)))
    return found


def _check_is_there(part: str, module: Any, name: str, config: PeftConfig) -> None:
    if name not in getattr(module, "peft_config", {}):
        raise ValueError(f"The adapter was saved with {name!r} in {part}, which this model hasn't. {ELSEWHERE}")
    _check_same_configuration(part, name, module.peft_config[name], config)


def _check_same_configuration(part: str, name: str, there: PeftConfig, saved: PeftConfig) -> None:
    wrong = differing_fields(there, saved, lambda field: field not in UNRELATED and not field.startswith("init_"))
    if wrong:
        raise ValueError(
            f"{part} has an adapter {name!r} of another configuration than the saved one ({', '.join(wrong)}), so "
            "nothing was loaded. Take a base model without it, or with the very same."
        )


def _rewrites_base(config: PeftConfig) -> bool:
    """Whether an adapter starts by changing the weights that it adapts, as PiSSA and OLoRA do."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva")


def _activate(module: Any, active: list[str], is_trainable: bool) -> None:
    """Let some of a part's adapters act, and no other of their methods."""
    for name in active:
        if name not in module.peft_config:
            raise ValueError(f"The adapter's configuration lets {name!r} act, which was saved in no file.")
    for kind in {PEFT_TYPE_TO_TUNER_MAPPING[c.peft_type].tuner_layer_cls for c in module.peft_config.values()}:
        names = [
            n for n in active if PEFT_TYPE_TO_TUNER_MAPPING[module.peft_config[n].peft_type].tuner_layer_cls is kind
        ]
        for layer in module.modules():
            if isinstance(layer, kind):
                layer.set_adapter(names, inference_mode=not is_trainable)


def _layers(module: Any, name: str) -> list[Any]:
    """The layers of an adapter's method in a part."""
    inner = PEFT_TYPE_TO_TUNER_MAPPING[module.peft_config[name].peft_type].tuner_layer_cls
    return [layer for layer in module.modules() if isinstance(layer, inner)]


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


def _check_weights(module: Any, name: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that aren't those of an adapter in a part, before anything is copied."""
    given = {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
    expected = _weights(module, name)
    faults = [f"missing or unexpected: {key}" for key in sorted(set(given) ^ set(expected))]
    if len(given) < len(weights):
        faults.append("a weight twice, with and without a prefix")
    for key, value in given.items():
        if key in expected:
            faults += faults_of(key, value, expected[key])
    if faults:
        raise ValueError(
            f"The weights of the adapter {name!r} in a {type(module).__name__} don't fit, so nothing was loaded: "
            f"{faults[0]}"
        )


def _set_weights(module: Any, name: str, weights: Mapping[str, Tensor]) -> None:
    inner = PEFT_TYPE_TO_TUNER_MAPPING[module.peft_config[name].peft_type].tuner_layer_cls
    renamed = {}
    for key, value in weights.items():
        key = key.removeprefix(PEFT_PREFIX)
        for other in _around(module, inner):
            if key.startswith(f"{other}."):
                key = f"{other}.base_layer.{key.removeprefix(f'{other}.')}"
        renamed[key] = value
    set_peft_model_state_dict(module, renamed, name)
