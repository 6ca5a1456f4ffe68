"""What the recurrences take for a cell: torch's modules, and `Recurrence`, which has their weights by their names."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


State: TypeAlias = Tensor | tuple[Tensor, Tensor]
Cell: TypeAlias = nn.RNN | nn.GRU | nn.LSTM | Any

# Input and recurrent matrix and their biases, for each direction.
WEIGHTS = [
    [name + suffix for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] for suffix in ("_l0", "_l0_reverse")
]


def kind_of(cell: Cell) -> str:
    """`"rnn_tanh"`, `"rnn_relu"`, `"gru"` or `"lstm"`.

    Raises:
        TypeError: if `cell` is none of torch's modules, nor a `Recurrence`.
        ValueError: if it has several layers, a projection, or isn't batch-first.
    """
    if hasattr(cell, "kind"):  # a `Recurrence`
        return str(cell.kind)
    if not isinstance(cell, (nn.RNN, nn.GRU, nn.LSTM)):
        raise TypeError(f"`cell` must be an nn.RNN, nn.GRU or nn.LSTM, got {type(cell).__name__}.")
    if cell.num_layers != 1 or not cell.batch_first or cell.proj_size:
        raise ValueError(
            "`cell` must have one layer, batch_first=True and no projection, got "
            f"num_layers={cell.num_layers}, batch_first={cell.batch_first}, proj_size={cell.proj_size}."
        )
    return f"rnn_{cell.nonlinearity}" if isinstance(cell, nn.RNN) else cell.mode.lower()


def weights_of(cell: Cell, direction: int, dtype: torch.dtype) -> list[Tensor]:
    """Input and recurrent matrix, and the two biases if there are any, of one direction."""
    has_bias = getattr(cell, "bias", True)
    weights = [getattr(cell, name) for name in WEIGHTS[direction][: 4 if has_bias else 2]]
    return [weight if weight.dtype == dtype else weight.to(dtype) for weight in weights]
