"""The source of states that a name stands for."""

from __future__ import annotations

from torch import nn

from .sequences import BlockStates, InputStates
from .states import SOURCES, FunctionStates, StateFunction, StateSource
from .towers import TowerStates, find_dual_encoder


def state_source(model: nn.Module, states: str | StateFunction) -> StateSource:
    """The source that a name or a function stands for.

    Args:
        model: the model that will be trained, adapted.
        states: one of `SOURCES`, or a function; `"auto"`: the towers of a dual encoder, else the last adapted block;
            `"inputs"`: likewise the towers, else what enters the first adapted tower.

    Raises:
        ValueError: if the model has no such states.
    """
    if callable(states):
        return FunctionStates(states)
    if states not in SOURCES:
        raise ValueError(f"pvla_states={states!r}: expected a function or one of {', '.join(map(repr, SOURCES))}.")
    dual = find_dual_encoder(model)
    if states == "towers" and dual is None:
        raise ValueError(f"pvla_states='towers', but {type(model).__name__} is no dual encoder such as CLIP.")
    if dual is not None and states in ("auto", "towers", "inputs"):
        return TowerStates(dual)
    return (
        InputStates(model) if states == "inputs" else BlockStates(model, "last_block" if states == "auto" else states)
    )
