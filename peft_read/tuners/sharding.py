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
    apart = [embeddings for embeddings in _embeddings(model) if embeddings is not None]
    found, around_embeddings = set(), set()
    for module in model.modules():
        name = type(module).__name__
        if name in named:
            found.add(name)
            if any(part is embeddings for part in module.modules() for embeddings in apart):
                around_embeddings.add(name)
    return sorted(found - around_embeddings)


def embeddings_are_a_unit(model: nn.Module) -> bool:
    """Whether the word embeddings, and the head that is tied to them, can be sharded by themselves.

    They can't where other modules share their weight, as in T5 and BART, or where the model doesn't tell them.
    """
    embeddings, head = _embeddings(model)
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        return False
    owners = [m for m in model.modules() if any(p is weight for p in m.parameters(recurse=False))]
    return all(owner is embeddings or owner is head for owner in owners)


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


def _embeddings(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Word embeddings and head, as far as the model tells."""
    found: list[nn.Module | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            found.append(None)
    return found[0], found[1]
