"""The recurrences by Triton's kernel, as an autograd function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import without_autocast
from .dispatch import GATES
from .triton_chunks import all_chunks


CHUNK = 32
LONGEST_CHUNK = 128
MANY_WARPS = 1024  # at once, from which on more of them gain nothing: then chunks are longer
GUESS = 48  # steps after which a recurrence as it is initialised has forgotten where it began
ROUNDS = 8
# By the padded number of states and by the matrices, which take up to 128 registers of a thread (192 of a wide GRU's).
WARPS = {16: {1: 1, 3: 1, 4: 1}, 32: {1: 1, 3: 1, 4: 1}, 64: {1: 2, 3: 4, 4: 4}, 128: {1: 4, 3: 8, 4: 16}}
# Steps of which all is loaded while those before them run. More take longer to compile, and registers.
GROUP = {16: {1: 4, 3: 4, 4: 2}, 32: {1: 4, 3: 4, 4: 2}, 64: {1: 2, 3: 2, 4: 2}, 128: {1: 2, 3: 2, 4: 2}}
KEPT = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}  # vectors that a step keeps for the backward pass
SENT = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 6, "lstm": 4}  # vectors that the backward pass sends into a step's gates
TOLERANCE = 4 * torch.finfo(torch.float32).eps
_NOTHING = nullcontext()
_compiled: dict[tuple[Any, ...], Any] = {}


class _Run:
    """One run over all sequences: how they are cut, and the kernel's scratch memory, see there."""

    def __init__(self, kind: str, states: Tensor, *, backward: bool) -> None:
        self.batch, self.time, self.size = states.shape
        self.padded = max(16, triton.next_power_of_2(self.size))
        self.warps, self.group = (of[self.padded][GATES[kind]] for of in (WARPS, GROUP))
        self.length = CHUNK
        while self.length < LONGEST_CHUNK and self.batch * self.time * self.warps > MANY_WARPS * self.length:
            self.length *= 2
        self.count = -(-self.time // self.length)
        self.programs = self.batch * self.count
        self.kind, self.backward = kind, backward
        self.totals = self.batch + self.programs * (2 + 2 * self.size + (2 * self.size + 1) * (ROUNDS + 1))
        self.scratch = states.new_zeros(self.totals + self.programs * self.size * SENT[kind] * backward)

    def launch(self, tensors: tuple[Tensor | None, ...], *, keep: bool = False) -> None:
        """Launch the kernel on its arguments up to the scratch memory.

        At every launch, Triton works out from all arguments which of the kernels that it has compiled is theirs. That
        takes longer than all else here, and it never is another one: the kernel isn't specialised for numbers or
        addresses, and all tensors are float32. So it is remembered.
        """
        numbers = (self.time, self.size, self.count, self.length, GUESS, ROUNDS, TOLERANCE)
        constants = (self.kind, self.backward, keep, self.padded, self.group)
        grid = (self.programs, 1, 1)
        key = (self.scratch.device, self.warps, constants, *[tensor is None for tensor in tensors])
        compiled = _compiled.get(key)
        with _on_device(self.scratch.device):
            if compiled is None:
                options = {"num_warps": self.warps, "enable_fp_fusion": True}
                _compiled[key] = all_chunks[grid](*tensors, self.scratch, *numbers, *constants, **options)
            else:
                addresses = [None if tensor is None else tensor.data_ptr() for tensor in (*tensors, self.scratch)]
                compiled[grid](*addresses, *numbers, *constants)

    def sums(self) -> Tensor:
        """What the gates received over all steps, `(vectors * size,)`."""
        return self.scratch[self.totals :].view(-1, self.programs).sum(1)


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


class KernelScan(torch.autograd.Function):
    """A recurrence of `KEPT` in float32: `(batch, time, features)` -> states `(batch, time, hidden)`.

    Starts from state and memory `(batch, hidden)`, or from zeros where they are None, and gives an LSTM's last memory
    besides, which is None for others. Biases may be None as well. `keep` says whether there will be a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        keep: bool,
        x: Tensor,
        w_in: Tensor,
        w_hidden: Tensor,
        b_in: Tensor | None,
        b_hidden: Tensor | None,
        hidden: Tensor | None,
        memory: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The scan, and what its backward pass needs of it."""
        size = w_hidden.shape[1]
        states = x.new_empty(*x.shape[:2], size)
        keep = keep and KEPT[kind] > 0
        kept = x.new_empty(*x.shape[:2], KEPT[kind] * size) if keep else None
        inputs, transposed = F.linear(x, w_in, b_in).contiguous(), w_hidden.t().contiguous()
        b_hidden, hidden, memory = (None if part is None else part.contiguous() for part in (b_hidden, hidden, memory))
        last = x.new_empty(x.shape[0], size) if kind == "lstm" else None
        given = (inputs, transposed, b_hidden, hidden, memory, hidden, memory, states, kept, None, None, last)
        _Run(kind, states, backward=False).launch(given, keep=keep)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w_in, w_hidden, hidden, memory, states, kept)
        return states, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_memory: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of what `forward` was given, in its order."""
        x, w_in, w_hidden, hidden, memory, states, kept = ctx.saved_tensors
        grad = torch.zeros_like(states) if grad is None else grad.contiguous()
        grad_memory = None if grad_memory is None else grad_memory.contiguous()
        kind, rows, size = ctx.kind, len(w_in), states.shape[2]
        sent = SENT[kind] * size
        record = states.new_empty(states.shape[0] * states.shape[1], sent + size)
        needed = ctx.needs_input_grad
        first, first_memory = (states.new_empty(states.shape[0], size) if needed[i] else None for i in (7, 8))
        run = _Run(kind, states, backward=True)
        given = (grad, w_hidden.contiguous(), None, None, grad_memory, hidden, memory, states, kept, record)
        run.launch((*given, first, first_memory))

        # What a step sends into its gates through its inputs, and through the state before it. That is one and the
        # same, except for the new state of a GRU, of which the reset gate takes part of the latter.
        to_inputs = to_states = record.narrow(1, 0, rows)
        sum_inputs = sum_states = sums = run.sums() if needed[5] or needed[6] else None
        if sent != rows:
            to_states = record.narrow(1, rows, rows)
            sum_inputs, sum_states = (None, None) if sums is None else sums.split(rows)
        with without_autocast(x.device):
            return (
                None,
                None,
                torch.mm(to_inputs, w_in).view_as(x) if needed[2] else None,
                torch.mm(to_inputs.t(), x.flatten(0, 1)) if needed[3] else None,
                torch.mm(to_states.t(), record.narrow(1, sent, size)) if needed[4] else None,
                sum_inputs,
                sum_states,
                first,
                first_memory,
            )
