"""The cell of an adapter as a module."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from .cells import WEIGHTS, State
from .dispatch import GATES
from .scan import scan_each_way


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

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: State | None = None,
        starts: Tensor | None = None,
        *,
        with_memory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """`(batch, time, directions * hidden)`, see `recurrent_scan`.

        Args:
            x: as there.
            mask: as there.
            state: as there; not together with `starts`.
            starts: `(batch, time)`, bool, true where the state begins anew, besides each row's first step.
            with_memory: give besides an LSTM's memory after the last step, `(batch, directions, hidden)`; None for
                others. Not with `starts`.
        """
        outputs, final = scan_each_way(x, self, mask, state, starts, needs_memory=with_memory)
        if not with_memory:
            return outputs
        return outputs, final[1].transpose(0, 1) if len(final) == 2 else None

    def extra_repr(self) -> str:
        """Kind, size and directions, for `print`."""
        return f"{self.kind}, {self.hidden_size}, bidirectional={self.bidirectional}"
