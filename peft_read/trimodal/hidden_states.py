"""Lets `output_hidden_states` show what an adapter has made of a block's output."""

from __future__ import annotations

from torch import Tensor
from transformers.utils.output_capturing import _active_collector


def show_hidden_states(before: Tensor, after: Tensor) -> None:
    """Put the adapted hidden states in the place of a block's own, in what a running model collects.

    transformers collects hidden states by hooks on blocks, which a module around a block comes too late for. Call this
    there, after the block and before returning. Nothing happens if the running model doesn't collect, or collects
    later by itself.

    Args:
        before: the block's output.
        after: what the rest of the model gets in its place.
    """
    collected = (_active_collector.get() or {}).get("hidden_states")
    if collected and collected[-1] is before:
        collected[-1] = after
