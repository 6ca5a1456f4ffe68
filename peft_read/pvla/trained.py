"""What of a model is trained before some states, and what could be."""

from __future__ import annotations

from torch import Tensor, nn

from ..architectures.targets import find_feed_forward_outputs


def reaches_trained(states: Tensor) -> bool:
    """Whether a trained parameter is in the graph behind these states, and no other tensor that needs a gradient."""
    todo, seen = [states.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        todo.extend(before for before, _ in node.next_functions)
    return False


def modules_that_project(model: nn.Module, tower: nn.Module, width: int | None) -> list[str]:
    """Names of the modules beside a tower that make something as wide as its words, as `modules_to_save` takes them.

    Args:
        model: the adapted model, which contains the tower.
        tower: whose input is meant.
        width: of its words' embeddings.
    """
    if width is None:
        return []
    inside = set(tower.modules())
    around = {name for name, module in model.named_modules() if tower in set(module.modules())}
    found = []
    for name, module in model.named_modules():
        if module in inside or name in around or getattr(module, "out_features", None) != width:
            continue
        parts = name.split(".")
        start = next(end for end in range(1, len(parts) + 1) if ".".join(parts[:end]) not in around)
        # What holds blocks is a tower of its own, of which the projection is a part.
        end = next((n for n in range(start, len(parts)) if not _holds_blocks(model, parts[:n])), len(parts))
        if not any(part.isdigit() for part in parts[start - 1 : end]):
            found.append(".".join(parts[start - 1 : end]))
    return list(dict.fromkeys(found))


def _holds_blocks(model: nn.Module, path: list[str]) -> bool:
    return bool(find_feed_forward_outputs(model.get_submodule(".".join(path))))
