"""The recurrence of READ: a masked scan of a one-layer RNN, GRU or LSTM over time.

Functions of tensors, which know neither PEFT nor any model. On CPU the vanilla and the gated recurrence run as one
autograd function each, whose backward pass is written out: a small step costs less than the bookkeeping that autograd
and torch's CPU kernels wrap around it. Everything else goes through torch's own kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


State: TypeAlias = Tensor | tuple[Tensor, Tensor]


def recurrent_scan(
    x: Tensor, cell: nn.RNNBase, *, mask: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """Run a recurrent cell over the valid steps of a padded batch.

    Equals `cell` on each row's valid steps alone, gradients included, wherever the padding lies. A padded step doesn't
    advance the state: its output repeats that of the valid step before it (before the first one: the initial hidden
    state). Runs in float32 (float64 for float64 input) whatever surrounds it, autocast included, and can be
    differentiated once, also while `cell` is in eval mode.

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
        ValueError: if `cell` has several layers, a projection, or isn't batch-first; if shapes don't fit each other.
    """
    _check_cell(cell)
    batch, time = _check_input(x, cell, mask)
    directions = 2 if cell.bidirectional else 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    initial = _check_state(state, cell, directions, batch)
    if batch == 0 or time == 0:
        raise ValueError(f"`x` must have at least one row and one step, got shape {tuple(x.shape)}.")

    with without_autocast(x.device):
        outputs, finals = [], []
        for direction in range(directions):
            weights = [None if w is None else w.to(dtype) for w in _weights(cell, direction)]
            start = tuple(part[direction].to(dtype) for part in initial) or _zero_state(cell, x, dtype)
            steps, valid = x.to(dtype), mask
            if direction == 1:
                steps, valid = steps.flip(1), None if valid is None else valid.flip(1)
            output, final = _scan(cell, steps, valid, weights, start)
            outputs.append(output.flip(1) if direction == 1 else output)
            finals.append(final)
    parts = [torch.stack(part) for part in zip(*finals, strict=True)]
    joined = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    return joined.to(x.dtype), (parts[0], parts[1]) if isinstance(cell, nn.LSTM) else parts[0]


def packed_states(
    x: Tensor, outputs: Tensor, cell: nn.RNNBase, *, mask: Tensor | None = None, state: State | None = None
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
    if not isinstance(cell, nn.LSTM):
        return outputs
    batch, _, size = outputs.shape
    hidden, memory = (part[0] for part in state) if state is not None else outputs.new_zeros(2, batch, size)
    with without_autocast(x.device):
        before = torch.cat([hidden[:, None], outputs[:, :-1]], dim=1)
        w_in, w_hidden, b_in, b_hidden = (None if w is None else w.to(outputs.dtype) for w in _weights(cell, 0))
        assert w_in is not None
        assert w_hidden is not None
        gates = F.linear(x, w_in, b_in) + F.linear(before, w_hidden, b_hidden)
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


def unpack_state(packed: Tensor, cell: nn.RNNBase) -> State:
    """One step of `packed_states`, `(batch, width)`, as the `state` of `recurrent_scan`."""
    if isinstance(cell, nn.LSTM):
        hidden, memory = packed.chunk(2, dim=-1)
        return hidden[None], memory[None]
    return packed[None]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on `device` keep the dtypes of their arguments."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _scan(
    cell: nn.RNNBase, x: Tensor, mask: Tensor | None, weights: list[Tensor | None], start: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction, forwards in time: outputs `(batch, time, hidden)` and the final state, `(batch, hidden)` each."""
    if mask is None:
        return _scan_valid(cell, x, weights, start)
    # Valid steps move to the front of their row, so that the kernels need no mask, and their outputs move back.
    order = torch.argsort(mask.logical_not(), dim=1, stable=True)
    compact = x.gather(1, order[..., None].expand_as(x))
    if isinstance(cell, nn.LSTM):
        # Its cell state isn't among the outputs, so the padding at the end must leave it as it is: one more feature,
        # set there, shuts the input gate and opens the forget gate, both exactly.
        ended = mask.logical_not().gather(1, order)[..., None].to(x.dtype)
        compact, weights = torch.cat([compact, ended], dim=-1), _with_stop_feature(weights)
    outputs, final = _scan_valid(cell, compact, weights, start)
    steps_so_far = mask.cumsum(dim=1)
    states = torch.cat([start[0][:, None], outputs], dim=1)
    index = steps_so_far[..., None].expand(-1, -1, states.shape[-1])
    outputs = states.gather(1, index)
    return outputs, (outputs[:, -1], *final[1:])


def _scan_valid(
    cell: nn.RNNBase, x: Tensor, weights: list[Tensor | None], start: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`_scan` where every step is valid."""
    w_in, w_hidden, b_in, b_hidden = weights
    if x.device.type == "cpu" and not isinstance(cell, nn.LSTM) and getattr(cell, "nonlinearity", "tanh") == "tanh":
        assert w_in is not None
        assert w_hidden is not None
        inputs = F.linear(x, w_in, b_in).transpose(0, 1)
        bias = w_hidden.new_zeros(w_hidden.shape[0]) if b_hidden is None else b_hidden
        function = _GatedScan if isinstance(cell, nn.GRU) else _VanillaScan
        states = function.apply(inputs, w_hidden, bias, start[0]).transpose(0, 1)
        return states, (states[:, -1],)
    # `train=True` keeps what the backward pass needs: cuDNN refuses it for a cell in eval mode otherwise.
    parameters = [w for w in weights if w is not None]
    rest = (parameters, cell.bias, 1, 0.0, torch.is_grad_enabled(), False, True)
    initial = [part[None].contiguous() for part in start]
    if isinstance(cell, nn.LSTM):
        outputs, hidden, memory = torch.lstm(x, initial, *rest)
        return outputs, (hidden[0], memory[0])
    if isinstance(cell, nn.GRU):
        kernel = torch.gru
    else:
        kernel = torch.rnn_tanh if cell.nonlinearity == "tanh" else torch.rnn_relu
    outputs, hidden = kernel(x, initial[0], *rest)
    return outputs, (hidden[0],)


class _VanillaScan(torch.autograd.Function):
    """h_t = tanh(inputs_t + W h_(t-1) + b), time first: `inputs (time, batch, hidden)` -> states of the same shape."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        driven = inputs + bias
        states = torch.empty_like(driven)
        recurrent = weight.t()
        hidden = start
        for drive, state in zip(driven.unbind(), states.unbind(), strict=True):
            torch.addmm(drive, hidden, recurrent, out=state)
            hidden = state.tanh_()
        ctx.save_for_backward(weight, start, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, start, states = ctx.saved_tensors
        slopes = 1 - states * states
        deltas = torch.empty_like(states)
        carry = torch.zeros_like(start)
        for g, slope, delta in zip(
            reversed(grad.unbind()), reversed(slopes.unbind()), reversed(deltas.unbind()), strict=True
        ):
            torch.add(g, carry, out=delta)
            delta.mul_(slope)
            carry = delta @ weight
        before = torch.cat([start[None], states[:-1]])
        grad_weight = deltas.flatten(0, 1).t() @ before.flatten(0, 1)
        return deltas, grad_weight, deltas.sum((0, 1)), carry


class _GatedScan(torch.autograd.Function):
    """The GRU of `nn.GRU`, time first: `inputs (time, batch, 3 * hidden)`, gates reset, update, new, to its states.

    r, z = sigmoid(inputs_rz + W_rz h + b_rz);  n = tanh(inputs_n + r * (W_n h + b_n));  h = n + z * (h - n).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        time, batch, width = inputs.shape
        size = width // 3
        states = inputs.new_empty(time, batch, size)
        recurrent = inputs.new_empty(time, batch, width)
        gates = inputs.new_empty(time, batch, 2 * size)
        news = inputs.new_empty(time, batch, size)
        inputs_gates, inputs_new = inputs[..., : 2 * size].unbind(), inputs[..., 2 * size :].unbind()
        into, out_of = recurrent[..., : 2 * size].unbind(), recurrent[..., 2 * size :].unbind()
        resets, updates = gates[..., :size].unbind(), gates[..., size:].unbind()
        transposed, hidden = weight.t(), start
        for t, (product, gate, new, state) in enumerate(
            zip(recurrent.unbind(), gates.unbind(), news.unbind(), states.unbind(), strict=True)
        ):
            torch.addmm(bias, hidden, transposed, out=product)
            torch.add(inputs_gates[t], into[t], out=gate)
            gate.sigmoid_()
            torch.addcmul(inputs_new[t], resets[t], out_of[t], out=new)
            new.tanh_()
            torch.lerp(new, hidden, updates[t], out=state)
            hidden = state
        ctx.save_for_backward(weight, start, states, recurrent[..., 2 * size :], gates, news)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, start, states, recurrent_new, gates, news = ctx.saved_tensors
        time, batch, size = states.shape
        reset, update = gates.chunk(2, dim=-1)
        before = torch.cat([start[None], states[:-1]])
        # What one unit of dh at a step sends into each gate before its nonlinearity; no step depends on another here.
        to_new = (1 - update) * (1 - news * news)
        to_reset = to_new * recurrent_new * reset * (1 - reset)
        to_update = (before - news) * update * (1 - update)
        share = torch.stack([to_reset, to_update, to_new * reset], dim=2)
        deltas = torch.empty_like(share)
        hidden_grads = torch.empty_like(states)
        flat = deltas.view(time, batch, 3 * size)
        carry = torch.zeros_like(start)
        for g, dh, part, delta, rows, keep in zip(
            *(reversed(t.unbind()) for t in (grad, hidden_grads, share, deltas, flat, update)), strict=True
        ):
            torch.add(g, carry, out=dh)
            torch.mul(dh[:, None], part, out=delta)
            carry = torch.addmm(dh * keep, rows, weight)
        grad_inputs = flat.clone()
        torch.mul(hidden_grads, to_new, out=grad_inputs[..., 2 * size :])
        grad_weight = flat.flatten(0, 1).t() @ before.flatten(0, 1)
        return grad_inputs, grad_weight, flat.sum((0, 1)), carry


def _weights(cell: nn.RNNBase, direction: int) -> list[Tensor | None]:
    """Input and recurrent matrix, then the two biases (None without), of one direction."""
    suffix = "_l0_reverse" if direction == 1 else "_l0"
    return [getattr(cell, name + suffix, None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def _with_stop_feature(weights: list[Tensor | None]) -> list[Tensor | None]:
    """LSTM weights (gates: in, forget, new, out) with one more feature, which freezes the cell state where it is 1."""
    w_in = weights[0]
    assert w_in is not None
    size = w_in.shape[0] // 4
    stop = w_in.new_zeros(w_in.shape[0], 1)
    stop[:size], stop[size : 2 * size] = -1e4, 1e4
    return [torch.cat([w_in, stop], dim=1), *weights[1:]]


def _zero_state(cell: nn.RNNBase, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    zero = x.new_zeros(x.shape[0], cell.hidden_size, dtype=dtype)
    return (zero, zero) if isinstance(cell, nn.LSTM) else (zero,)


def _check_cell(cell: nn.RNNBase) -> None:
    if not isinstance(cell, (nn.RNN, nn.GRU, nn.LSTM)):
        raise TypeError(f"`cell` must be an nn.RNN, nn.GRU or nn.LSTM, got {type(cell).__name__}.")
    if cell.num_layers != 1 or not cell.batch_first or cell.proj_size:
        raise ValueError(
            "`cell` must have one layer, batch_first=True and no projection, got "
            f"num_layers={cell.num_layers}, batch_first={cell.batch_first}, proj_size={cell.proj_size}."
        )


def _check_input(x: Tensor, cell: nn.RNNBase, mask: Tensor | None) -> tuple[int, int]:
    if x.ndim != 3 or x.shape[-1] != cell.input_size:
        raise ValueError(f"`x` must be (batch, time, {cell.input_size}), got shape {tuple(x.shape)}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be boolean, true where a step is valid, got {mask.dtype}.")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"`mask` must be (batch, time) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}.")
    return x.shape[0], x.shape[1]


def _check_state(state: State | None, cell: nn.RNNBase, directions: int, batch: int) -> tuple[Tensor, ...]:
    if state is None:
        return ()
    parts = state if isinstance(state, tuple) else (state,)
    expected = (directions, batch, cell.hidden_size)
    count = 2 if isinstance(cell, nn.LSTM) else 1
    if len(parts) != count or any(tuple(part.shape) != expected for part in parts):
        raise ValueError(
            f"`state` of this {type(cell).__name__} must be {count} tensor(s) of shape {expected}, got "
            f"{[tuple(part.shape) for part in parts]}."
        )
    return parts
