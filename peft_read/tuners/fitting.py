"""Whether weights fit an adapter: nothing missing, nothing besides, of the right shapes, and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .checks import shown


PEFT_PREFIX = "base_model.model."
# Fields of a configuration that say nothing of what an adapter computes.
UNRELATED = {"inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type"}


def check_fit(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    weights: Mapping[str, Tensor],
    layers: Mapping[str, tuple[str, ...]],
) -> dict[str, Tensor]:
    """The weights that may be copied into a model, if they are those of an adapter and of nothing else.

    An adapter owns the weights in its own layers, and those of whole modules and of tokens that its configuration
    trains beside them. Word embeddings may be in the file as well: PEFT saves them where the vocabulary was resized.
    They are taken where the model's vocabulary isn't that of the base model which the configuration names, and left
    out where they are what the model has.

    Args:
        model: the model, with the adapter in it.
        config: the adapter's configuration.
        adapter_name: the adapter's name.
        weights: by their keys in the model, with or without `base_model.model.` in front.
        layers: by their names in the model, the layers that hold adapters of this method, and which of their
            attributes hold weights.

    Returns:
        `weights`, with the keys of the model.

    Raises:
        ValueError: if anything doesn't fit; the message names it.
    """
    in_model = model.state_dict()
    given = {key if key in in_model else key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
    if len(given) < len(weights):
        plain = [key for key in weights if key.removeprefix(PEFT_PREFIX) != key]
        twice = next(key for key in plain if key.removeprefix(PEFT_PREFIX) in weights)
        raise ValueError(
            f"The file names a weight twice, so nothing was loaded: {twice}, with and without its prefix."
        )
    owned = dict.fromkeys(_owned(model, adapter_name, in_model, layers))
    given = {
        key: value
        for key, value in given.items()
        if key in owned or not _is_in_embeddings(model, key) or not _is_same(value, in_model.get(key))
    }
    is_meta = all(value.is_meta for value in in_model.values())
    buffers = {name for name, _ in model.named_buffers()}
    besides = [key for key in given if key not in owned]
    if any(_is_in_embeddings(model, key) for key in besides) and _vocabulary_was_resized(model, config):
        besides = [key for key in besides if key not in in_model or not _is_in_embeddings(model, key)]
    faults = [f"missing: {key}" for key in owned if key not in given]
    faults += [f"unexpected: {key}{_hint(model, key, in_model)}" for key in besides]
    for key, value in given.items():
        if key in in_model and key not in besides:
            faults += faults_of(key, value, in_model[key], key in buffers)
            if isinstance(value, Tensor) and value.is_meta and in_model[key].is_meta and not is_meta:
                faults.append(f"no values: {key} is on the meta device")
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        name = config.base_model_name_or_path
        named = f" (the adapter names {shown(name)})" if name else ""
        raise ValueError(
            f"The weights don't fit adapter {adapter_name!r}, so nothing was loaded. They may belong to another "
            f"base model{named} or another configuration:\n  "
            + "\n  ".join(fault if len(fault) < 400 else f"{fault[:400]}..." for fault in faults[:10])
            + more
        )
    return given


def _owned(
    model: nn.Module, adapter_name: str, in_model: Mapping[str, Tensor], layers: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Keys of an adapter's own weights, and of the modules and tokens that are trained beside them."""
    names = tuple(f"{layer}.{part}.{adapter_name}." for layer, parts in layers.items() for part in parts)
    owned = [key for key in in_model if key.startswith(tuple(_unsharded(name) for name in names))] if names else []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = module.adapter_state_dict_load_map(adapter_name).values()
            owned += [key for key in (_unsharded(f"{name}.{each}") for each in own) if key in in_model]
    return owned


def _unsharded(name: str) -> str:
    """As FSDP names it in a state dict, not in the model."""
    return name.removeprefix("_fsdp_wrapped_module.")


def faults_of(key: str, value: Tensor, there: Tensor, is_buffer: bool = False) -> list[str]:
    """What keeps a weight of a file from being copied into a model's, in words; empty if nothing does."""
    if not isinstance(value, Tensor):
        return [f"no tensor: {key}: {shown(value)} in the file"]
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return [f"no plain tensor: {key}: sparse, quantized or nested in the file"]
    if value.shape != there.shape:
        return [f"wrong shape: {key}: {tuple(value.shape)} in the file, {tuple(there.shape)} in the model"]
    if value.dtype != there.dtype and not (value.is_floating_point() and there.is_floating_point()):
        return [f"wrong type: {key}: {value.dtype} in the file, {there.dtype} in the model"]
    if value.is_meta and not there.is_meta:
        return [f"no values: {key} is on the meta device"]
    if not there.is_floating_point() or value.is_meta:
        return []
    local, own = (each.to_local() if isinstance(each, DTensor) else each for each in (value, there))
    fine = torch.isfinite(local.to(torch.promote_types(there.dtype, torch.float16)))
    if is_buffer and not fine.all() and not own.is_meta and own.shape == local.shape:
        # A mask of a model's own may be infinite.
        fine |= torch.isinf(own).to(fine.device) & ~torch.isnan(local)
    return [] if fine.all() else [f"not finite: {key}"]


def differing_fields(one: PeftConfig, other: PeftConfig, counts: Callable[[str], bool]) -> list[str]:
    """The fields of two configurations that count and aren't the same; a set is as good as a list, None as nothing."""
    first, second = one.to_dict(), other.to_dict()
    return [
        field
        for field in sorted(set(first) | set(second))
        if counts(field) and _plain(first.get(field)) != _plain(second.get(field))
    ]


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(map(str, value)) or None
    return None if value == {} else value


def _is_same(value: Tensor, there: Tensor | None) -> bool:
    return (
        there is not None
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta)
        and there.shape == value.shape
        and not there.is_meta
        and torch.equal(value.to(there.device, there.dtype), there)
    )


def _transformers_model(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _is_in_embeddings(model: nn.Module, key: str) -> bool:
    """Whether a key is of the word embeddings, or of the head over the vocabulary, wrapped or not."""
    base = _transformers_model(model)
    if base is None:
        return False
    name = (
        key.removeprefix(PEFT_PREFIX).rpartition(".")[0].removesuffix(".base_layer").removesuffix(".original_module")
    )
    for getter in (base.get_input_embeddings, base.get_output_embeddings):
        try:
            embeddings = getter()
        except (AttributeError, NotImplementedError):
            continue
        if embeddings is not None and _submodule(base, name) is embeddings:
            return True
    return False


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name) if name else None
    except AttributeError:
        return None


def _vocabulary_was_resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the model has another number of tokens than the base model that a configuration names, as PEFT asks."""
    base, name = _transformers_model(model), config.base_model_name_or_path
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    if base is None or size is None or not name:
        return False
    try:
        saved = type(base.config).from_pretrained(name, revision=config.revision or "main")
        return bool(saved.vocab_size != size)
    except (OSError, ValueError, AttributeError):  # it isn't there, or has no such configuration
        return False


def _hint(model: nn.Module, key: str, in_model: Mapping[str, Tensor]) -> str:
    if key not in in_model:
        return ""
    if _is_in_embeddings(model, key):
        return " (train word embeddings through `modules_to_save` or `trainable_token_indices`)"
    return " (the base model's own weight, which an adapter doesn't touch)"
