"""Taking back what an injection or a load did to a model before it was refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was if the body raises: its modules, their attributes, and which weights train.

    Remembers the attributes of every module, and the content of those that are dicts or lists: modules and weights by
    name, hooks, what layers keep by adapter. Weights in place are not copied.
    """
    before = [(module, dict(module.__dict__), _contents(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in contents:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        raise


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, (dict, list, set))]
