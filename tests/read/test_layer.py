"""One adapted layer against its formula: y + scaling * dropout(up(act(cell(down(y)))))."""

import pytest
import torch
from helpers import CLOSE, adapted
from torch import nn

from peft_read import describe_tokens
from peft_read.read.layer import ReadLayer


def one_layer(**options):
    model = adapted("bert", **options)
    return next(module for module in model.modules() if isinstance(module, ReadLayer))


def tokens(layer):
    return torch.randn(2, 6, layer.in_features, generator=torch.Generator().manual_seed(0))


def by_formula(layer, x, cell, activation, scaling=1.0):
    """torch's own module with the adapter's weights."""
    y, ours = layer.base_layer(x), layer.read_recurrence["default"]
    module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell](4, 4, batch_first=True)
    module.load_state_dict(ours.state_dict())
    states, _ = module(layer.read_downward["default"](y))
    return y + scaling * layer.read_upward["default"](activation(states))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(
    ("options", "activation", "scaling"),
    [
        ({}, nn.functional.gelu, 1.0),
        ({"act_fn": "relu"}, nn.functional.relu, 1.0),
        ({"scaling": -2.5}, nn.functional.gelu, -2.5),
        ({"scaling": 0.0, "act_fn": "silu"}, nn.functional.silu, 0.0),
    ],
    ids=["gelu", "relu", "scaled", "nothing"],
)
@torch.no_grad()
def test_formula(cell, options, activation, scaling):
    """Cell, activation and scaling do what the configuration says."""
    layer = one_layer(cell=cell, **options)
    x = tokens(layer)
    with describe_tokens():
        torch.testing.assert_close(layer(x), by_formula(layer, x, cell, activation, scaling), **CLOSE)


@torch.no_grad()
def test_dropout():
    """In training a share of what the adapter adds is dropped and the rest is larger; in evaluation nothing is."""
    layer, plain = one_layer(dropout=0.25), one_layer()
    x = tokens(layer).repeat(50, 1, 1)
    y = layer.base_layer(x)
    with describe_tokens():
        torch.testing.assert_close(layer.eval()(x), plain(x), **CLOSE)
        added, whole = layer.train()(x) - y, plain(x) - y
    kept = added.abs() > 1e-6
    assert 0.73 < kept.float().mean() < 0.77
    torch.testing.assert_close(added[kept], whole[kept] / 0.75, rtol=1e-3, atol=1e-5)
