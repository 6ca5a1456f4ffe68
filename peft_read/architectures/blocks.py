"""Where towers can meet: the blocks of any encoder, found by structure, and which of them belong to which level."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import nn

from .targets import MIXER, default_targets


def find_blocks(tower: nn.Module) -> list[str]:
    """Names of the blocks through which a tower's hidden states go, one after the other.

    A block is the smallest member of a list of modules that holds both parts of a transformer block: one that mixes
    tokens, and the feed-forward part. Blocks in several stages (Swin) count on through all stages. Where a tower has
    several such lists, as an encoder and what it was pretrained with, the one with the most parameters counts. A tower
    without such blocks may name modules that stand for them in an attribute `meeting_blocks`.

    Args:
        tower: a transformers encoder, or any module that contains one; it may hold adapters.

    Returns:
        Names in `tower`, in the order in which the blocks run; a block that runs several times (ALBERT) is named as
        often.

    Raises:
        ValueError: if there are no such blocks, as in convolutional towers.
    """
    named: list[str] | None = getattr(tower, "meeting_blocks", None)
    if named is not None:
        return list(named)
    stacks: dict[str, list[str]] = {}
    for output in default_targets(tower):
        block = _block_around(tower, output)
        if block is not None:
            stacks.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", f".{block}"), []).append(block)
    if not stacks:
        raise ValueError(
            f"No transformer blocks were found in a {type(tower).__name__}. Name them yourself, in the order in which "
            "they run, such as ['encoder.layers.0', 'encoder.layers.1']. Each has to take the hidden states "
            "`(batch, tokens, dim)` as its first argument and to return them, alone or first in a tuple, which a "
            "convolutional tower's (ResNet, ConvNeXt) don't: give its features to a peft_read.FeatureTower."
        )
    largest = max(stacks.values(), key=lambda names: sum(_size(tower, name) for name in names))
    return _in_order_of_calls(list(dict.fromkeys(largest)), getattr(tower, "config", None))


def block_width(tower: nn.Module, name: str) -> int:
    """Size of the hidden states that a block of a tower gives.

    That is the size of a norm of the block: the tower's `hidden_size` if it has one of that size, else the most
    frequent, as in stages that widen.

    Args:
        tower: the tower; its `config` is looked at if it has one.
        name: the block's name in it.

    Raises:
        ValueError: if the block has no norm with weights.
    """
    block = tower.get_submodule(name)
    hidden_size: int | None = getattr(getattr(tower, "config", None), "hidden_size", None)
    if name in (getattr(tower, "meeting_blocks", None) or ()) and hidden_size is not None:
        return hidden_size
    norms = (module for module in block.modules() if "norm" in type(module).__name__.lower())
    weights = (getattr(norm, "weight", None) for norm in norms)
    sizes = Counter(weight.numel() for weight in weights if isinstance(weight, nn.Parameter))
    if not sizes:
        raise ValueError(f"The width of {name}, a {type(block).__name__}, can't be told: it has no norm with weights.")
    return hidden_size if hidden_size is not None and hidden_size in sizes else sizes.most_common(1)[0][0]


def blocks_of_levels(depth: int, levels: int) -> list[int]:
    """After which block of a tower each level lies: level k of K after block (k + 1) * depth // K - 1.

    Levels lie as evenly as they can, and the last one after the last block; so towers of different depths meet at the
    same fraction of their depth. With 4 levels, a tower of 12 blocks has them after blocks 2, 5, 8 and 11, a tower of
    6 after 0, 2, 3 and 5.

    Args:
        depth: the tower's number of blocks.
        levels: how many levels there are.

    Returns:
        An index of a block for each level, rising.

    Raises:
        ValueError: if there are more levels than blocks, or none.
    """
    if not 1 <= levels <= depth:
        raise ValueError(f"A tower with {depth} blocks can have 1 to {depth} levels, not {levels}.")
    return [(level + 1) * depth // levels - 1 for level in range(levels)]


def _block_around(tower: nn.Module, output: str) -> str | None:
    """The innermost member of a list around the end of a feed-forward part in which tokens are mixed as well."""
    parts = output.split(".")
    for end in range(len(parts), 0, -1):
        name, around = ".".join(parts[:end]), ".".join(parts[: end - 1])
        in_list = isinstance(tower.get_submodule(around), nn.ModuleList | nn.Sequential)
        if in_list and _mixes(tower.get_submodule(name)):
            return name
    return None


def _mixes(block: nn.Module) -> bool:
    return any(
        MIXER.search(f"{name.rpartition('.')[2]} {type(module).__name__}")
        for name, module in block.named_modules()
        if module is not block
    )


def _size(tower: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in tower.get_submodule(name).parameters())


def _in_order_of_calls(names: list[str], config: Any) -> list[str]:
    """Blocks that share weights with themselves at other depths, as often as they run."""
    groups = getattr(config, "num_hidden_groups", None)  # ALBERT
    if groups:
        depth, each = config.num_hidden_layers, len(names) // groups
        return [names[layer * groups // depth * each + inner] for layer in range(depth) for inner in range(each)]
    repeats = getattr(config, "block_repeats", None)  # Funnel
    if repeats:
        of_layer = [times for size, times in zip(config.block_sizes, repeats, strict=True) for _ in range(size)]
        return [name for name, times in zip(names, of_layer, strict=True) for _ in range(times)]
    return names
