"""Batches with an adapter per sample: whole modules that adapters train and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.utils._pytree import tree_map


def mixed_rows(
    wrapper: ModulesToSaveWrapper,
    adapter_names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    """What a module of `modules_to_save` gives for a batch whose samples name an adapter each.

    PEFT mixes rows in linear and convolutional layers and embeddings only. Here each adapter's copy of the module runs
    over the whole batch, and each sample's rows are taken from what its own adapter's gave: right for any module that
    treats the rows of its batch one by one.

    Args:
        wrapper: PEFT's wrapper of the module.
        adapter_names: one name per sample; `"__base__"`, and an adapter without a copy, stand for the base's module.
        args: the module's arguments.
        kwargs: likewise, those by name.
        output: what the copy of the active adapter gave.

    Raises:
        ValueError: if the output's rows aren't those of the samples.
    """
    if wrapper.disable_adapters:
        return output
    outputs: dict[str, Any] = {}
    for name in dict.fromkeys(adapter_names):
        own = name if name in wrapper.modules_to_save else "__base__"
        if own in outputs:
            outputs[name] = outputs[own]
        elif wrapper.active_adapters and own == wrapper.active_adapters[0]:
            outputs[name] = output
        else:
            module = wrapper.original_module if own == "__base__" else wrapper.modules_to_save[own]
            outputs[name] = outputs[own] = module(*args, **kwargs)

    def take(*tensors: Any) -> Any:
        if not isinstance(tensors[0], Tensor):
            return tensors[0]
        each, left = divmod(len(tensors[0]), len(adapter_names))
        if left or not each:
            raise ValueError(
                f"`adapter_names` must name one adapter per sample: got {len(adapter_names)} names for "
                f"{len(tensors[0])} rows of a {type(wrapper.original_module).__name__} in `modules_to_save`."
            )
        number = {name: index for index, name in enumerate(used)}
        choice = torch.tensor([number[name] for name in adapter_names]).repeat_interleave(each)
        rows = torch.arange(len(tensors[0]))
        return torch.stack(tensors)[choice, rows]

    used = list(dict.fromkeys(adapter_names))
    return tree_map(take, outputs[used[0]], *(outputs[name] for name in used[1:]))
