"""The states after every step of a scan as one tensor, from which any later scan may start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import without_autocast
from .cells import Cell, State, kind_of, weights_of


def packed_states(
    x: Tensor, outputs: Tensor, cell: Cell, *, mask: Tensor | None = None, state: State | None = None
) -> Tensor:
    """The state after every step of a scan, as one tensor, from which any later scan may start.

    Args:
        x: `(batch, time, features)`, what was scanned.
        outputs: `(batch, time, hidden)`, what `recurrent_scan` gave for it, in one direction.
        cell: as there.
        mask: as there.
        state: as there.

    Returns:
        `(batch, time, hidden)`, for an LSTM `(batch, time, 2 * hidden)` with its memory behind the hidden state.
    """
    if kind_of(cell) != "lstm":
        return outputs
    batch, _, size = outputs.shape
    hidden, memory = (part[0] for part in state) if state is not None else outputs.new_zeros(2, batch, size)
    with without_autocast(x.device):
        before = torch.cat([hidden[:, None], outputs[:, :-1]], dim=1)
        w_in, w_hidden, *biases = weights_of(cell, 0, outputs.dtype)
        gates = F.linear(x, w_in, biases[0] if biases else None)
        gates = gates + F.linear(before, w_hidden, biases[1] if biases else None)
        enter, keep, new, _ = gates.chunk(4, dim=-1)
        keep, added = keep.sigmoid(), enter.sigmoid() * new.tanh()
        if mask is not None:
            keep = torch.where(mask[..., None], keep, 1)
            added = torch.where(mask[..., None], added, 0)
        memories = []
        for factor, term in zip(keep.unbind(1), added.unbind(1), strict=True):
            memory = torch.addcmul(term, factor, memory)
            memories.append(memory)
    return torch.cat([outputs, torch.stack(memories, dim=1)], dim=-1)


def unpack_state(packed: Tensor, cell: Cell) -> State:
    """One step of `packed_states`, `(batch, width)`, as the `state` of `recurrent_scan`."""
    if kind_of(cell) == "lstm":
        hidden, memory = packed.chunk(2, dim=-1)
        return hidden[None], memory[None]
    return packed[None]
