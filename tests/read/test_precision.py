"""Half precision and autocast: the adapter computes in float32 inside, whatever surrounds it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import adapted, adapter_parameters, batch_of, loss_of, result
from models import WIDE, WIDTH, base_model
from peft import get_peft_model
from torch import nn

from peft_read import ReadConfig
from peft_read.read.layer import ReadLayer


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
OWN = {"rnn_tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
BATCH = batch_of("bert", padding="left", lengths=(16, 9, 2))


def capture(model):
    """The outputs of the base layer and of the adapted layer, as a forward goes through the first of them."""
    layer = next(module for module in model.modules() if isinstance(module, ReadLayer))
    seen = {}
    handles = [
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.__setitem__("base", output)),
        layer.register_forward_hook(lambda module, args, output: seen.__setitem__("adapted", output)),
    ]
    return layer, seen, handles


def by_hand(layer, hidden, mask):
    """READ by its definition in float32, row by row, with torch's own modules."""
    rows = []
    for row, valid in zip(hidden.float(), mask.bool(), strict=True):
        down, up = (getattr(layer, name)["default"] for name in ("read_downward", "read_upward"))
        bottleneck = F.linear(row[valid], down.weight.float(), down.bias.float())[None]
        if "default" in layer.read_recurrence:
            cell = layer.read_recurrence["default"]
            twin = OWN[cell.kind](cell.input_size, cell.hidden_size, batch_first=True)
            twin.load_state_dict({name: value.float() for name, value in cell.state_dict().items()})
            bottleneck = twin(bottleneck)[0]
        delta = F.linear(F.gelu(bottleneck[0]), up.weight.float(), up.bias.float())
        rows.append(delta.to(hidden.dtype) + row[valid].to(hidden.dtype))
    return torch.cat(rows)


def check_against_hand(model, batch, dtype):
    layer, seen, handles = capture(model)
    with torch.no_grad():
        model(**batch)
        with torch.autocast("cpu", enabled=False):
            expected = by_hand(layer, seen["base"], batch["attention_mask"])
    for handle in handles:
        handle.remove()
    assert seen["base"].dtype == seen["adapted"].dtype == dtype
    actual = seen["adapted"][batch["attention_mask"].bool()]
    # One rounding of the result apart; in half precision inside it would be many.
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@CELLS
@HALVES
def test_autocast_leaves_the_recurrence_in_float32(cell, dtype):
    """Under autocast the base computes in half precision, the adapter as without autocast."""
    model = adapted("bert", cell=cell)
    with torch.autocast("cpu", dtype):
        check_against_hand(model, BATCH, dtype)


@CELLS
@HALVES
def test_autocast_trains(cell, dtype):
    """Gradients under autocast are float32 and close to those without."""
    model = adapted("bert", cell=cell).train()
    loss_of("bert", model, BATCH).backward()
    expected = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = loss_of("bert", model, BATCH)
    loss.backward()
    for name, p in adapter_parameters(model).items():
        assert p.grad.dtype == torch.float32
        difference = (p.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 16 * torch.finfo(torch.bfloat16).eps, name


@CELLS
@HALVES
def test_half_precision_base(cell, dtype):
    """PEFT keeps adapters of a half-precision model in float32; they compute so and return the base's dtype."""
    torch.manual_seed(0)
    model = get_peft_model(base_model("bert").to(dtype), ReadConfig(r=4, cell=cell, init_weights=False)).eval()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    check_against_hand(model, BATCH, dtype)


@CELLS
@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()])
def test_a_converted_model(cell, convert):
    """A model that is converted after injection, adapters included, computes in float32 inside and trains."""
    model = convert(adapted("bert", cell=cell)).eval()
    dtype = next(model.parameters()).dtype
    assert {p.dtype for p in adapter_parameters(model).values()} == {dtype}
    if dtype != torch.float64:
        check_against_hand(model, BATCH, dtype)
    loss_of("bert", model.train(), BATCH).float().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter_parameters(model).values())


@CELLS
def test_double_precision_stays_double(cell):
    """A float64 model isn't computed in float32: central differences agree with its gradient."""
    model = adapted("bert", cell=cell).double()
    loss_of("bert", model, BATCH).backward()
    step, generator = 1e-5, torch.Generator().manual_seed(0)
    for name, p in adapter_parameters(model).items():
        if "layer.0" not in name:
            continue
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                p.add_(sign * step * direction)
                losses.append(loss_of("bert", model, BATCH))
        expected = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close((p.grad * direction).sum(), expected, rtol=1e-5, atol=1e-9)


@CELLS
def test_inference_mode(cell):
    """`torch.inference_mode` gives what `no_grad` gives, and training goes on afterwards."""
    model = adapted("bert", cell=cell)
    with torch.inference_mode():
        actual = result("bert", model, BATCH)
    assert actual.is_inference()
    torch.testing.assert_close(actual.clone(), result("bert", model, BATCH), rtol=0, atol=1e-6)
    loss_of("bert", model.train(), BATCH).backward()


def test_a_float32_layer_in_a_half_precision_forward():
    """A base layer that gives float32 in a half-precision model keeps doing so (T5 keeps `wo` in float32)."""
    model = base_model("t5_encoder").bfloat16()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    batch = batch_of("t5_encoder", padding="left")
    expected = model(**batch).last_hidden_state
    wrapped = get_peft_model(model, ReadConfig(r=4, cell="gru"))
    layer, seen, _ = capture(wrapped)
    torch.testing.assert_close(wrapped(**batch).last_hidden_state, expected, rtol=0, atol=0)
    assert layer.weight.dtype == torch.float32
    assert seen["adapted"].dtype == torch.float32


def test_shapes_of_these_tests():
    """The wrapped layer is the feed-forward part's second: from wide to narrow."""
    layer = next(module for module in adapted("bert").modules() if isinstance(module, ReadLayer))
    assert (layer.in_features, layer.out_features) == (WIDE, WIDTH)
