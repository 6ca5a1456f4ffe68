"""Bases that accelerate has offloaded: their weights lie in memory or on disk, and come to a device while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module, one by one."""
    hook = getattr(module, "_hf_hook", None)
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [] if hook is None else [hook]


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module runs, wherever its weights lie; None if nobody has offloaded it."""
    for part in module.modules():
        for hook in hooks_of(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings a module's weights when it is called, and takes them away again."""
    return next((hook for hook in hooks_of(module) if getattr(hook, "offload", False)), None)


def check_can_hold_adapters(model: nn.Module, name: str) -> None:
    """Refuse a module around which accelerate brings all weights at once, by their names.

    Args:
        model: the model to adapt.
        name: the module's name in it.

    Raises:
        ValueError: if there is such a hook.
    """
    parts = name.split(".")
    for depth in range(len(parts) + 1):
        around = ".".join(parts[:depth])
        hook = offloading_hook(model.get_submodule(around))
        if hook is not None and hook.place_submodules:
            raise ValueError(
                f"{name} can't be adapted: accelerate offloads {around or 'the model'} as a whole and would offload "
                "the adapter with it. Dispatch the model without `preload_module_classes`, or adapt it first."
            )


def check_weights_have_values(model: nn.Module, ours: type[BaseTunerLayer] | None = None) -> None:
    """Refuse other methods' adapters of offloaded layers, whose weights PEFT makes without values.

    Args:
        model: the model, or a part of it.
        ours: layers to leave out: this package's bring their weights to where they run.

    Raises:
        ValueError: if there are such weights.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or (ours is not None and isinstance(module, ours)):
            continue
        layer: Any = module
        held = [getattr(layer, each) for each in layer.adapter_layer_names]
        own = [parameter for each in held if isinstance(each, nn.Module) for parameter in each.parameters()]
        if any(parameter.is_meta for parameter in own) and any(offloading_hook(each) for each in layer.modules()):
            raise ValueError(
                f"The adapter at {name}, a {type(layer).__name__}, has weights without values: the layer is "
                "offloaded. Put the adapter there before the model is offloaded, or keep the layer on a device in "
                "the `device_map`."
            )


def bring_trained_modules(model: nn.Module, adapter_name: str) -> None:
    """Give trained copies of offloaded modules weights of their own, on the device where they run.

    PEFT copies the modules of `modules_to_save`; the copy of an offloaded one would lose after each call what was
    trained. Copies that share a weight, as those of tied embeddings do, go on sharing it.

    Raises:
        ValueError: if single tokens of offloaded embeddings are to be trained.
    """
    brought: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    copies: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and offloading_hook(module.token_adapter.base_layer):
            raise ValueError(
                f"`trainable_token_indices` needs the weights of {name}, which is offloaded. Keep it on a device in "
                "the `device_map`."
            )
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copies += module.modules_to_save[adapter_name].modules()
    for part in copies:
        _bring_weights(part, brought)
    for part in copies:  # PEFT makes a head that is tied to embeddings anew, without a hook
        for key, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) in brought:
                part.register_parameter(key, brought[id(parameter)][1])


def _bring_weights(module: nn.Module, brought: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Give a module new weights; `brought` holds the old and the new ones by the old ones' ids."""
    hook = offloading_hook(module)
    if hook is None:
        return
    old = dict(module.named_parameters(recurse=False))
    hook.pre_forward(module)
    for name, parameter in old.items():
        if id(parameter) not in brought:
            weight = getattr(module, name).detach().clone()
            brought[id(parameter)] = parameter, nn.Parameter(weight, requires_grad=parameter.requires_grad)
        module.register_parameter(name, brought[id(parameter)][1])
    hook.offload = False


@contextmanager
def as_it_is_dispatched(model: nn.Module) -> Iterator[None]:
    """Hide from PEFT that parts of a model are offloaded, so that it leaves them where they are.

    PEFT takes accelerate's hooks away, dispatches the adapted model anew by a guess of its own, and for parts on disk
    writes a checkpoint of its own: over the base model's, where that lies in a folder.
    """
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map
