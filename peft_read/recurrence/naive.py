"""The recurrences step by step, as they are defined: what every other file here has to equal. Read this one first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_scan(
    kind: str,
    x: Tensor,
    weights: list[Tensor],
    *,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    state: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a recurrence over the valid steps of every row, in one direction.

    A step is that of `torch.nn.RNN`, `GRU` and `LSTM`, with u = W_in x_t + b_in and v = W h + b:

    - `rnn_tanh`: h = tanh(u + v); `rnn_relu`: h = relu(u + v);
    - `gru`, gates r, z, n: h = (1 - z) n + z h, where r, z = sigmoid(u + v) and n = tanh(u + r v);
    - `lstm`, gates i, f, g, o: c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c).

    A masked step leaves the state as it is, and gives it again. Where a sequence starts, the state is zero.

    Args:
        kind: as above.
        x: `(batch, time, features)`.
        weights: `W_in (gates * hidden, features)`, `W (gates * hidden, hidden)`, `b_in` and `b (gates * hidden,)`.
        mask: `(batch, time)`, bool, true where a step is valid; all are by default.
        starts: `(batch, time)`, bool, true where a sequence begins, besides each row's first step.
        state: `(batch, hidden)`, for an LSTM its memory as a second; zero by default.

    Returns:
        The states `(batch, time, hidden)`, and the last state like `state`.

    Example:
        >>> x, cell = torch.randn(2, 5, 8), torch.nn.LSTM(8, 4, batch_first=True)
        >>> states, last = naive_scan("lstm", x, list(cell.parameters()))
        >>> torch.allclose(states, cell(x)[0], atol=1e-6)
        True
    """
    w_in, w_hidden, b_in, b_hidden = weights
    zeros = x.new_zeros(x.shape[0], w_hidden.shape[1])
    h, c = zeros, zeros
    if state is not None:
        h, c = state[0], state[-1]
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            h, c = (torch.where(starts[:, t, None], zeros, part) for part in (h, c))
        u, v = F.linear(x[:, t], w_in, b_in), F.linear(h, w_hidden, b_hidden)
        memory = c
        if kind == "gru":
            (r, z, n), (v_r, v_z, v_n) = u.chunk(3, dim=-1), v.chunk(3, dim=-1)
            r, z = (r + v_r).sigmoid(), (z + v_z).sigmoid()
            hidden = (1 - z) * (n + r * v_n).tanh() + z * h
        elif kind == "lstm":
            i, f, g, o = (u + v).chunk(4, dim=-1)
            memory = f.sigmoid() * c + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * memory.tanh()
        else:
            hidden = (u + v).relu() if kind == "rnn_relu" else (u + v).tanh()
        valid = torch.ones_like(zeros[:, :1], dtype=torch.bool) if mask is None else mask[:, t, None]
        h, c = torch.where(valid, hidden, h), torch.where(valid, memory, c)
        outputs.append(h)
    return torch.stack(outputs, dim=1), [h, c] if kind == "lstm" else [h]
