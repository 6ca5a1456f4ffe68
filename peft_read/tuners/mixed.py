"""Batches with an adapter per sample: whole modules that adapters train and save."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def check_can_be_mixed(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Refuse a batch of adapters that train what can't be mixed row by row.

    These are tokens of embeddings that some adapters train and others don't, since PEFT mixes the former only; and
    biases of distances, as T5 has, whose rows are positions.

    Raises:
        ValueError: if there are such adapters.
    """
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name.endswith("relative_attention_bias"):
            copies = {each if each in module.modules_to_save else "__base__" for each in adapter_names}
            if len(copies) > 1 and not module.disable_adapters:
                raise ValueError(
                    f"`adapter_names` can't mix adapters that train {name}: its rows aren't those of samples. Run the "
                    "samples of each adapter by themselves, after `set_adapter`."
                )
        if isinstance(module, TrainableTokensWrapper) and not module.disable_adapters:
            known = module.token_adapter.trainable_tokens_delta
            without = sorted(set(adapter_names) - set(known) - {"__base__"})
            if without:
                raise ValueError(
                    f"`adapter_names` can't mix adapters that train tokens of {name} with {without[0]!r}, which "
                    "trains none. Run its samples by themselves, after `set_adapter`."
                )


def rows_per_sample(arguments: Iterable[Any], samples: int, beams: int) -> set[int]:
    """How many rows of a batch a sample may have inside of a model: one, or its frames or tokens, times its beams.

    Args:
        arguments: of the model's call.
        samples: in the batch.
        beams: that `generate` makes of each.
    """
    found = {1}
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            for depth in (1, 2):
                each, left = divmod(math.prod(tensor.shape[:depth]), max(samples, 1))
                found |= set() if left or not each else {each}
    return found | {each * beams for each in found}


def mixed_rows(
    wrapper: ModulesToSaveWrapper,
    adapter_names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    multiples: Collection[int],
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
        multiples: how many rows a sample may have.

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
        if left or each not in multiples:
            raise ValueError(
                f"`adapter_names` must name one adapter per sample: got {len(adapter_names)} names for "
                f"{len(tensors[0])} rows of a {type(wrapper.original_module).__name__} in `modules_to_save`. If its "
                "rows aren't those of samples, run the samples of each adapter by themselves, after `set_adapter`."
            )
        number = {name: index for index, name in enumerate(used)}
        choice = torch.tensor([number[name] for name in adapter_names]).repeat_interleave(each)
        rows = torch.arange(len(tensors[0]))
        return torch.stack(tensors)[choice, rows]

    used = list(dict.fromkeys(adapter_names))
    return tree_map(take, outputs[used[0]], *(outputs[name] for name in used[1:]))
