"""The recurrence of READ: a masked scan of a one-layer RNN, GRU or LSTM over time.

Functions of tensors, which know neither PEFT nor any model. What they have to give is in `naive.py`, step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_float32, without_autocast
from .cells import Cell, State, kind_of, weights_of
from .sequences import masked_scan, scan_sequences


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

    Example:
        >>> x, cell = torch.randn(2, 5, 8), torch.nn.GRU(8, 4, batch_first=True)
        >>> mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
        >>> outputs, state = recurrent_scan(x, cell, mask=mask)
        >>> torch.allclose(outputs[:1, 2:], cell(x[:1, 2:])[0], atol=1e-6)  # the padded row, as it is alone
        True
        >>> outputs.shape, state.shape
        (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """
    outputs, final = scan_each_way(x, cell, mask, state, None, needs_memory=True)
    return outputs, (final[0], final[1]) if kind_of(cell) == "lstm" else final[0]


def scan_each_way(
    x: Tensor, cell: Cell, mask: Tensor | None, state: State | None, starts: Tensor | None, *, needs_memory: bool
) -> tuple[Tensor, list[Tensor]]:
    """See `recurrent_scan`; an LSTM's last memory may be wrong under a mask if it isn't needed."""
    kind = kind_of(cell)
    _check_input(x, cell, mask)
    dtype = at_least_float32(x.dtype)
    directions = 2 if cell.bidirectional else 1
    initial = _check_state(state, kind, (directions, x.shape[0], cell.hidden_size), x, dtype)

    def scan_one_way(direction: int, steps: Tensor, mask: Tensor | None, starts: Tensor | None) -> list[Tensor]:
        weights = weights_of(cell, direction, dtype)
        start = initial
        if directions == 2 and initial is not None:
            start = [part[direction : direction + 1] for part in initial]
        if starts is not None:
            return [scan_sequences(kind, steps, mask, starts, weights)]
        return masked_scan(kind, steps, mask, weights, start, needs_memory)

    with without_autocast(x.device):
        steps = x if x.dtype == dtype else x.to(dtype)
        outputs, *final = scan_one_way(0, steps, mask, starts)
        if directions == 2:
            if starts is not None:  # backwards a sequence begins where the next one has begun
                starts = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], dim=1).flip(1)
            others, *ends = scan_one_way(1, steps.flip(1), None if mask is None else mask.flip(1), starts)
            outputs = torch.cat([outputs, others.flip(1)], dim=-1)
            final = [torch.cat(parts) for parts in zip(final, ends, strict=True)]
    return outputs if x.dtype == dtype else outputs.to(x.dtype), final


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
    return [part if part.dtype == dtype else part.to(dtype) for part in parts]
