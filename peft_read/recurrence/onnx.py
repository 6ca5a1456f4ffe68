"""The recurrence as ONNX has it: its operators RNN, GRU and LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .dispatch import GATES


# Where torch's gates lie among ONNX's. Of torch: GRU reset, update, new; LSTM in, forget, new, out.
_GATES_OF_ONNX = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` needs to know of READ's recurrence, for its argument `custom_translation_table`.

        torch.onnx.export(model, (), "model.onnx", kwargs=batch, custom_translation_table=onnx_translations())

    Returns:
        A translation of the operator `peft_read::scan` into ONNX's RNN, GRU and LSTM.

    Raises:
        ImportError: if the package onnxscript isn't installed, which torch's exporter needs as well.

    Example:
        >>> [str(operator) for operator in onnx_translations()]
        ['peft_read.scan.default']
    """
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("Exporting to ONNX needs more packages: pip install onnx onnxscript") from error

    def scan(
        kind: str, x: Any, w_in: Any, w_hidden: Any, b_in: Any, b_hidden: Any, hidden: Any, memory: Any
    ) -> tuple[Any, Any, Any]:
        op: Any = opset18
        size = w_hidden.shape[1]

        def reordered(weights: Any) -> Any:
            """`(gates * hidden, ...)` to `(1, gates * hidden, ...)`, the gates in ONNX's order."""
            order = [gate * size + i for gate in _GATES_OF_ONNX[kind] for i in range(size)]
            return op.Unsqueeze(op.Gather(weights, op.Constant(value_ints=order)), op.Constant(value_ints=[0]))

        bias = None if b_in.shape[0] == 0 else op.Concat(reordered(b_in), reordered(b_hidden), axis=1)
        steps = op.Transpose(x, perm=[1, 0, 2])
        inputs = (steps, reordered(w_in), reordered(w_hidden), bias, None, hidden)
        if kind == "lstm":
            states, last, memory = op.LSTM(*inputs, memory, hidden_size=size)
        elif kind == "gru":
            states, last = op.GRU(*inputs, hidden_size=size, linear_before_reset=1)
        else:
            activation = {"rnn_tanh": "Tanh", "rnn_relu": "Relu"}[kind]
            states, last = op.RNN(*inputs, hidden_size=size, activations=[activation])
        outputs = op.Transpose(op.Squeeze(states, op.Constant(value_ints=[1])), perm=[1, 0, 2])
        return outputs, last, memory

    assert _GATES_OF_ONNX.keys() == GATES.keys()
    return {torch.ops.peft_read.scan.default: scan}
