"""Where the states of videos and sentences come from in a running model: a source for each name."""

from __future__ import annotations

from typing import Any

from torch import nn

from .block_states import BlockStates
from .input_states import InputStates
from .sequences import SequenceStates
from .source import BLOCK_SOURCES, SOURCES, FunctionStates, StateFunction, StateSource, VideoTextStates
from .tokens import TokenMasks
from .towers import TowerStates, find_dual_encoder
from .words import TemplateTokens


__all__ = ["BLOCK_SOURCES", "SOURCES", "StateFunction", "StateSource", "VideoTextStates", "state_source"]


def state_source(
    model: nn.Module,
    states: str | StateFunction,
    *,
    words: str = "all",
    pool_frames: bool = False,
    processing: Any = None,
) -> StateSource:
    """The source that a name or a function stands for.

    Args:
        model: the model that will be trained, adapted.
        states: one of `SOURCES`, or a function; `"auto"`: the towers of a dual encoder, else the last adapted block;
            `"inputs"`: likewise the towers, else what enters the first adapted tower.
        words: which text tokens of a sequence are words, one of `WORDS`.
        pool_frames: whether each frame's tokens in a sequence are one state.
        processing: the tokenizer or processor, which knows tokens that are never words.

    Raises:
        ValueError: if the model has no such states.
    """
    source = _source(model, states)
    if isinstance(source, SequenceStates):
        source.masks = TokenMasks(model, words, TemplateTokens.of(processing))
        source.pools_frames = pool_frames
    elif words != "all" or pool_frames:
        raise ValueError(
            "pvla_words and pvla_pool_frames are for video and words in one sequence; a function of one's own, and "
            "the towers of a dual encoder, give frames and words themselves. Leave them out."
        )
    return source


def _source(model: nn.Module, states: str | StateFunction) -> StateSource:
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
