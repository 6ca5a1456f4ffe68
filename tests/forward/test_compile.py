"""Compiled and exported models give what eager ones give, without breaks at READ's layers."""

import pytest
import torch
from generators import CACHE
from helpers import adapted, batch_of, strengthen
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from peft_read import ReadConfig
from peft_read.recurrence import operator as scan
from peft_read.recurrence.module import Recurrence


CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@CELLS
@pytest.mark.parametrize("padding", ["left", None])
def test_an_encoder_is_one_graph(cell, padding):
    """No break at any layer, the same outputs and gradients as in eager mode."""
    model = adapted("bert", cell=cell)
    batch = batch_of("bert", padding=padding) if padding else batch_of("bert", lengths=(5, 5))
    weights = [p for name, p in model.named_parameters() if "read_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    results = []
    for run in (model, compiled):
        states = run(**batch).last_hidden_state
        # The sum of their squares hardly changes behind a norm: its gradients would be roundings.
        results.append([states, *torch.autograd.grad(states[..., 0].sum(), weights)])
    assert counter.frame_count == 1
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4 * float(eager.detach().abs().max()))


@torch.no_grad()
def test_decoding_with_a_static_cache_is_compiled_once():
    """One graph for all tokens; logits as without a cache."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    torch.manual_seed(0)
    model = strengthen(get_peft_model(LlamaForCausalLM(config), ReadConfig(r=4, cell="gru"))).eval()
    ids = torch.randint(3, 50, (2, 12))
    expected = model(input_ids=ids, use_cache=False).logits
    cache = StaticCache(config=config, max_cache_len=16)
    model(input_ids=ids[:, :5], **{CACHE: cache}, use_cache=True)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    for position in range(5, 12):
        logits = step(input_ids=ids[:, position : position + 1], **{CACHE: cache}, use_cache=True).logits
        torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@torch.no_grad()
def test_a_masked_scan_is_compiled_by_inductor():
    """By torch's default backend, which can lower less than the others trace. Padding of NaN stays out of the scan."""
    cell, x, mask = Recurrence("gru", 4), torch.randn(3, 9, 4), torch.ones(3, 9)
    mask[0, :4] = mask[1, 3] = mask[1, 7:] = 0
    x[mask == 0] = torch.nan
    compiled = torch.compile(lambda x, mask: cell(x, mask != 0), fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), cell(x, mask != 0))


@CELLS
@torch.no_grad()
def test_an_exported_encoder(cell):
    """`torch.export` keeps the padding that it is given."""
    model, batch = adapted("bert", cell=cell).get_base_model(), batch_of("bert", padding="left")
    program = torch.export.export(model, (), kwargs=batch)
    torch.testing.assert_close(program.module()(**batch).last_hidden_state, model(**batch).last_hidden_state)


# torch 2.14's own check looks at it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_the_operator_keeps_its_promises(kind):
    """Schema, autograd registration and fake kernel, by torch's own check."""
    cell = Recurrence(kind, 4)
    x, hidden = torch.randn(2, 5, 4, requires_grad=True), torch.zeros(1, 2, 4)
    memory = torch.zeros(1, 2, 4) if kind == "lstm" else x.new_empty(0)
    weights = (cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0)
    torch.library.opcheck(scan._scan_operator, (cell.kind, x, *weights, hidden, memory))


def test_torch_s_own_cells_break_the_graph():
    """Why READ has cells of its own: dynamo refuses torch's. If this fails, they may go."""
    with pytest.raises(Exception, match="RNN, GRU, or LSTM"):
        torch.compile(nn.GRU(4, 4, batch_first=True), backend="eager", fullgraph=True)(torch.randn(1, 3, 4))
