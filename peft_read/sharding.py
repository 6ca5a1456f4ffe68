"""Which parts of a model FSDP shards one by one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def blocks_to_shard(model: nn.Module, adapted: Iterable[nn.Module] = ()) -> list[str]:
    """Names of the classes whose modules FSDP wraps, each as a unit whose weights are gathered together.

    The model's own list, `_no_split_modules`, without what Accelerate would stop at: classes of which the model has no
    module, and those around the word embeddings, which it shards by themselves (BERT's list has both embeddings and
    blocks). A model that has no list is sharded by the blocks around its adapted modules.

    Args:
        model: the model, adapted or not.
        adapted: the modules in it that are adapted.
    """
    named = set(getattr(model, "_no_split_modules", None) or _classes_of_blocks(model, set(adapted)))
    apart = {id(embeddings) for embeddings in _embeddings(model)}
    found, around_embeddings = set(), set()
    for module in model.modules():
        name = type(module).__name__
        if name in named:
            found.add(name)
            if any(id(part) in apart for part in module.modules()):
                around_embeddings.add(name)
    return sorted(found - around_embeddings)


def _classes_of_blocks(model: nn.Module, adapted: set[nn.Module]) -> set[str]:
    """Of the members of the innermost lists of modules around adapted modules, or which are those."""
    names = set()
    for blocks in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for block in blocks:
            inside = set(block.modules())
            lists = (part for part in inside if isinstance(part, nn.ModuleList))
            if inside & adapted and not any(set(inner.modules()) & adapted for inner in lists):
                # A wrapped block, not its wrapper: activation checkpointing goes by these names as well.
                names.add(type(getattr(block, "base_layer", block)).__name__)
    return names


def _embeddings(model: nn.Module) -> list[nn.Module]:
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # no transformers model, or one without words
            continue
        found += [embeddings] if isinstance(embeddings, nn.Module) else []
    return found
