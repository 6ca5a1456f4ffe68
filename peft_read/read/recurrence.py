"""The recurrence of READ: a masked scan of a one-layer RNN, GRU or LSTM over time.

Functions of tensors, which know neither PEFT nor any model.
"""

from __future__ import annotations

import math
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import without_autocast
from .compaction import Compaction
from .eager import GATES
from .scan import scan


State: TypeAlias = Tensor | tuple[Tensor, Tensor]
Cell: TypeAlias = "nn.RNN | nn.GRU | nn.LSTM | Recurrence"

# Input and recurrent matrix and their biases, for each direction.
WEIGHTS = [
    [name + suffix for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] for suffix in ("_l0", "_l0_reverse")
]


class Recurrence(nn.Module):
    """A one-layer, batch-first recurrent cell whose call gives the outputs of `recurrent_scan`.

    Has the weights of torch's own modules, by their names and with their initialisation. Those modules can't be
    compiled, and Accelerate's hooks only see weights that a call of their module uses.

    Args:
        kind: `"rnn"` (tanh), `"gru"` or `"lstm"`.
        size: of the input and of the state.
        bidirectional: run both ways, each with a state of its own.
    """

    def __init__(self, kind: str, size: int, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.kind = "rnn_tanh" if kind == "rnn" else kind
        self.input_size = self.hidden_size = size
        self.bidirectional = bidirectional
        rows, bound = GATES[self.kind] * size, 1 / math.sqrt(size)
        shapes = [(rows, size), (rows, size), (rows,), (rows,)]
        for names in WEIGHTS[: 1 + bidirectional]:
            for name, shape in zip(names, shapes, strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    @property
    def weight(self) -> Tensor:
        """The recurrent matrix. PEFT's policy for FSDP1 wraps trained modules by themselves that have a `weight`."""
        return cast(Tensor, self.weight_hh_l0)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> Tensor:
        """`(batch, time, directions * hidden)`, see `recurrent_scan`."""
        return _scan_each_way(x, self, mask, state, needs_memory=False)[0]

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.hidden_size}, bidirectional={self.bidirectional}"


def recurrent_scan(
    x: Tensor, cell: Cell, *, mask: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """Run a recurrent cell over the valid steps of a padded batch.

    Equals `cell` on each row's valid steps alone, gradients included, wherever the padding lies. A padded step doesn't
    advance the state: its output repeats that of the valid step before it (before the first one: the initial hidden
    state). Runs in float32 (float64 for float64 input) whatever surrounds it, autocast included, and can be
    differentiated once, also while `cell` is in eval mode.

    States are those of running step by step up to a few roundings of a sequence's largest one, gradients likewise. On
    CUDA, Triton kernels run it where triton is installed, in float32, with at most 128 states, on a GPU of compute
    capability 8.0 or more. There a small scan is compared with torch's first: if it fails, a warning says so, and
    torch's kernels run. The environment variable `PEFT_READ_SCAN` forces either, `triton` or `torch`, here and in
    `partial_transport`.

    Args:
        x: `(batch, time, features)`, the steps.
        cell: one-layer, batch-first `nn.RNN`, `nn.GRU` or `nn.LSTM`, of one or two directions.
        mask: `(batch, time)`, bool, true where a step is valid; all steps are valid by default.
        state: the state to start from, `(directions, batch, hidden)`, for an LSTM a pair of them; zero by default.

    Returns:
        The outputs `(batch, time, directions * hidden)` in the dtype of `x`, and the state after each row's last valid
        step in the layout of `state` and the dtype of the computation.

    Raises:
        TypeError: if `cell` is no `nn.RNN`, `nn.GRU` or `nn.LSTM`, or `mask` isn't boolean.
        ValueError: if `cell` has several layers, a projection, or isn't batch-first; if shapes don't fit each other;
            if the environment variable forces what can't be.
    """
    outputs, final = _scan_each_way(x, cell, mask, state, needs_memory=True)
    return outputs, (final[0], final[1]) if _kind_of(cell) == "lstm" else final[0]


def _scan_each_way(
    x: Tensor, cell: Cell, mask: Tensor | None, state: State | None, *, needs_memory: bool
) -> tuple[Tensor, list[Tensor]]:
    """See `recurrent_scan`; an LSTM's last memory may be wrong under a mask if it isn't needed."""
    kind = _kind_of(cell)
    _check_input(x, cell, mask)
    dtype = torch.promote_types(x.dtype, torch.float32)
    directions = 2 if cell.bidirectional else 1
    initial = _check_state(state, kind, (directions, len(x), cell.hidden_size), x, dtype)
    with without_autocast(x.device):
        steps = x.to(dtype)
        if directions == 1:
            outputs, *final = _masked_scan(kind, steps, mask, _weights(cell, 0, dtype), initial, needs_memory)
        else:
            ahead, back = (None if initial is None else [part[i : i + 1] for part in initial] for i in range(2))
            outputs, *final = _masked_scan(kind, steps, mask, _weights(cell, 0, dtype), ahead, needs_memory)
            steps, mask = steps.flip(1), None if mask is None else mask.flip(1)
            others, *ends = _masked_scan(kind, steps, mask, _weights(cell, 1, dtype), back, needs_memory)
            outputs = torch.cat([outputs, others.flip(1)], dim=-1)
            final = [torch.cat(parts) for parts in zip(final, ends, strict=True)]
    return outputs.to(x.dtype), final


def _masked_scan(
    kind: str, x: Tensor, mask: Tensor | None, weights: list[Tensor], start: list[Tensor] | None, needs_memory: bool
) -> list[Tensor]:
    """`scan` over the valid steps alone."""
    if mask is None:
        return scan(kind, x, weights, start)
    compaction = Compaction(mask)
    compact = compaction.front(x)
    if kind == "lstm" and needs_memory:
        # It isn't among the outputs, so the padding at the end must leave it as it is: one more feature, set there,
        # shuts the input gate and opens the forget gate, both exactly.
        compact = torch.cat([compact, compaction.padding.to(x.dtype)], dim=-1)
        weights = _with_stop_feature(weights)
    outputs, *final = scan(kind, compact, weights, start)
    first = outputs.new_zeros(outputs.shape[0], outputs.shape[2]) if start is None else start[0][0]
    outputs = compaction.back(outputs, first)
    return [outputs, outputs[None, :, -1], *final[1:]]


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
    if _kind_of(cell) != "lstm":
        return outputs
    batch, _, size = outputs.shape
    hidden, memory = (part[0] for part in state) if state is not None else outputs.new_zeros(2, batch, size)
    with without_autocast(x.device):
        before = torch.cat([hidden[:, None], outputs[:, :-1]], dim=1)
        w_in, w_hidden, *biases = _weights(cell, 0, outputs.dtype)
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
    if _kind_of(cell) == "lstm":
        hidden, memory = packed.chunk(2, dim=-1)
        return hidden[None], memory[None]
    return packed[None]


def _kind_of(cell: Cell) -> str:
    if isinstance(cell, Recurrence):
        return cell.kind
    if not isinstance(cell, (nn.RNN, nn.GRU, nn.LSTM)):
        raise TypeError(f"`cell` must be an nn.RNN, nn.GRU or nn.LSTM, got {type(cell).__name__}.")
    if cell.num_layers != 1 or not cell.batch_first or cell.proj_size:
        raise ValueError(
            "`cell` must have one layer, batch_first=True and no projection, got "
            f"num_layers={cell.num_layers}, batch_first={cell.batch_first}, proj_size={cell.proj_size}."
        )
    return f"rnn_{cell.nonlinearity}" if isinstance(cell, nn.RNN) else cell.mode.lower()


def _weights(cell: Cell, direction: int, dtype: torch.dtype) -> list[Tensor]:
    """Input and recurrent matrix, and the two biases if there are any, of one direction."""
    has_bias = isinstance(cell, Recurrence) or cell.bias
    weights = [getattr(cell, name) for name in WEIGHTS[direction][: 4 if has_bias else 2]]
    return [weight if weight.dtype == dtype else weight.to(dtype) for weight in weights]


def _with_stop_feature(weights: list[Tensor]) -> list[Tensor]:
    """LSTM weights (gates: in, forget, new, out) with one more feature, which freezes the memory where it is 1."""
    w_in = weights[0]
    size = w_in.shape[0] // 4
    stop = torch.cat([w_in.new_full((size, 1), -1e4), w_in.new_full((size, 1), 1e4), w_in.new_zeros(2 * size, 1)])
    return [torch.cat([w_in, stop], dim=1), *weights[1:]]


def _check_input(x: Tensor, cell: Cell, mask: Tensor | None) -> None:
    if x.ndim != 3 or x.shape[-1] != cell.input_size:
        raise ValueError(f"`x` must be (batch, time, {cell.input_size}), got shape {tuple(x.shape)}.")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"`x` must have at least one row and one step, got shape {tuple(x.shape)}.")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be boolean, true where a step is valid, got {mask.dtype}.")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"`mask` must be (batch, time) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}.")


def _check_state(
    state: State | None, kind: str, shape: tuple[int, int, int], x: Tensor, dtype: torch.dtype
) -> list[Tensor] | None:
    """The initial states, `(directions, batch, hidden)` each; an LSTM has its memory as a second. None for zeros."""
    if state is None:
        return None
    count = 2 if kind == "lstm" else 1
    parts = state if isinstance(state, tuple) else (state,)
    if len(parts) != count or any(tuple(part.shape) != shape for part in parts):
        raise ValueError(
            f"`state` of this {kind.split('_')[0].upper()} must be {count} tensor(s) of shape {shape}, got "
            f"{[tuple(part.shape) for part in parts]}."
        )
    return [part.to(dtype) for part in parts]
