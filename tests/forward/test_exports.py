"""Adapted models leave Python: torch.export with open sizes, ONNX, torch.jit.trace."""

import functools

import pytest
import torch
from fresh import run_code
from helpers import CLOSE, adapted, batch_of
from torch import nn
from torch.export import Dim

from peft_read import onnx_translations, recurrent_scan
from peft_read.recurrence.module import Recurrence


CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
BOTH = [(cell, both) for cell in ("rnn", "gru", "lstm") for both in (False, True)] + [("none", False)]
IN_BOTH_DIRECTIONS = pytest.mark.parametrize(("cell", "bidirectional"), BOTH)


class Encoder(nn.Module):
    """An adapted BERT, of ids and mask."""

    def __init__(self, blocks=2, **options):
        super().__init__()
        self.model = adapted("bert", **options).get_base_model()
        del self.model.encoder.layer[blocks:]
        self.eval()

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def batches():
    """Two of other sizes, padded in other places."""
    for padding, lengths in (("left", (8, 5, 1)), ("holes", (9, 3)), ("right", (4, 4, 7, 2))):
        batch = batch_of("bert", padding=padding, lengths=lengths)
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def check(run, encoder, tolerance=1e-5):
    """`run` gives what the encoder gives for every valid token of every batch."""
    for batch in batches():
        valid = batch["attention_mask"].bool()
        with torch.no_grad():
            expected = encoder(**batch)
        torch.testing.assert_close(run(**batch)[valid], expected[valid], rtol=0, atol=tolerance)


@IN_BOTH_DIRECTIONS
@torch.no_grad()
def test_open_sizes(cell, bidirectional):
    """One program for any batch and length, masks included."""
    encoder, batch = Encoder(cell=cell, bidirectional=bidirectional), next(batches())
    sizes = {name: {0: Dim("batch"), 1: Dim("time", max=64)} for name in batch}
    program = torch.export.export(encoder, (), batch, dynamic_shapes=sizes)
    check(program.module(), encoder)


LOAD = """
import sys
import torch
import peft_read
program, batch, expected = torch.export.load(sys.argv[1]).module(), *torch.load(sys.argv[2])
torch.testing.assert_close(program(**batch), expected, rtol=0, atol=1e-5)
"""


@torch.no_grad()
def test_a_saved_program_runs_in_another_process(tmp_path):
    """It needs the package alone, for its operator."""
    encoder, batch = Encoder(cell="gru"), next(batches())
    sizes = {name: {0: Dim("batch"), 1: Dim("time", max=64)} for name in batch}
    torch.export.save(torch.export.export(encoder, (), batch, dynamic_shapes=sizes), tmp_path / "encoder.pt2")
    torch.save((batch, encoder(**batch)), tmp_path / "expected")
    run_code(LOAD, tmp_path / "encoder.pt2", tmp_path / "expected")


@torch.no_grad()
def test_a_decoder():
    """Without a cache, of any length."""
    model = adapted("llama", cell="lstm").get_base_model()
    ids = torch.randint(3, 49, (3, 9))
    sizes = {"input_ids": {0: Dim("batch"), 1: Dim("time")}, "use_cache": None}
    batch = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), batch, dynamic_shapes=sizes, strict=False)
    for given in (ids, torch.randint(3, 49, (2, 14))):
        expected = model(input_ids=given, use_cache=False).logits
        torch.testing.assert_close(program.module()(input_ids=given, use_cache=False).logits, expected, **CLOSE)


class Encoders(nn.ModuleDict):
    """Several of one block, which leave Python together: the exporter takes seconds for each program."""

    def forward(self, input_ids, attention_mask):
        return tuple(encoder(input_ids, attention_mask) for encoder in self.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own exporter
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:# The axis name. (batch|time) will not be used:UserWarning")
@torch.no_grad()
def test_onnx(tmp_path):
    """ONNX's own RNN, GRU and LSTM, run by onnxruntime, for any batch, length and padding.

    A recurrence of both directions is two of one.
    """
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    encoders = Encoders(
        {
            f"{cell} {both}": Encoder(blocks=1, cell=cell, bidirectional=both)
            for cell, both in (("rnn", True), ("gru", False), ("gru", True), ("lstm", True))
        }
    ).eval()
    batch = next(batches())
    torch.onnx.export(
        encoders,
        (),
        tmp_path / "encoders.onnx",
        kwargs=batch,
        dynamic_shapes={name: {0: Dim("batch"), 1: Dim("time", max=64)} for name in batch},
        custom_translation_table=onnx_translations(),
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "encoders.onnx")
    for i, encoder in enumerate(encoders.values()):
        check(lambda i=i, **given: run(session, given)[i], encoder)


def run(session, given):
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in given.items()})]


@IN_BOTH_DIRECTIONS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of transformers' own code
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")  # from torch 2.14 on
@torch.no_grad()
def test_trace(cell, bidirectional):
    """A traced model goes on with other sizes and masks as well."""
    encoder = Encoder(cell=cell, bidirectional=bidirectional)
    traced = torch.jit.trace(encoder, tuple(next(batches()).values()), check_trace=False)
    check(lambda input_ids, attention_mask: traced(input_ids, attention_mask), encoder)


@torch.no_grad()
def test_a_compiled_lstm_goes_on_from_its_memory():
    """The operator is given both of its states."""
    torch.manual_seed(0)
    cell, x = Recurrence("lstm", 4), torch.randn(2, 5, 4)
    state = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    expected, (hidden, memory) = recurrent_scan(x, cell, state=state)
    torch._dynamo.reset()
    run = functools.partial(recurrent_scan, cell=cell)
    compiled = torch.compile(lambda x, state: run(x, state=state), backend="aot_eager", fullgraph=True)
    for given, other in zip(compiled(x, state)[1], (hidden, memory), strict=True):
        torch.testing.assert_close(given, other, **CLOSE)
    torch.testing.assert_close(compiled(x, state)[0], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_compiled_sequences(kind):
    """Packed rows are one operator of a compiled model, with the gradients of the sequences alone."""
    torch.manual_seed(0)
    cell = Recurrence(kind, 4)
    x, starts = torch.randn(2, 7, 4, requires_grad=True), torch.zeros(2, 7, dtype=torch.bool)
    starts[0, 3] = starts[1, 1] = starts[1, 5] = True
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 2] = False
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: cell(x, mask, starts=starts), backend="aot_eager", fullgraph=True)
    results = []
    for run in (lambda x: cell(x, mask, starts=starts), compiled):
        outputs = run(x)
        results.append([outputs, *torch.autograd.grad(outputs.sin().sum(), [x, *cell.parameters()])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    alone = [cell(x[row : row + 1, a:b], mask[row : row + 1, a:b]) for row, a, b in [(0, 0, 3), (0, 3, 7), (1, 1, 5)]]
    for part, given in zip((results[0][0][0, :3], results[0][0][0, 3:], results[0][0][1, 1:5]), alone, strict=True):
        torch.testing.assert_close(part, given[0], **CLOSE)


def test_a_compiled_model_keeps_packed_sequences_apart():
    """By positions that begin again; compiled without a break."""
    model = adapted("llama", cell="gru")
    ids = torch.randint(3, 49, (1, 9))
    at = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        packed = compiled(input_ids=ids, position_ids=at, use_cache=False).logits[0]
        cuts = (slice(4), slice(4, 6), slice(6, 9))
        alone = [model(input_ids=ids[:, cut], use_cache=False).logits[0] for cut in cuts]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)
