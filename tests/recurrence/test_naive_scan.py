"""The recurrence as it is defined: against torch's modules, and all other ways to run it against that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_read.recurrence.cells import kind_of
from peft_read.recurrence.naive import naive_scan
from peft_read.recurrence.packed import packed_states
from peft_read.recurrence.scan import scan_each_way


CELLS = {
    "rnn": nn.RNN,
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
SIZE, BATCH = 4, 3


def make(name, time):
    torch.manual_seed(0)
    cell = CELLS[name](SIZE, SIZE, batch_first=True).double()
    x = torch.randn(BATCH, time, SIZE, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(BATCH, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "lstm"))]
    return cell, x, state


def as_of_torch(state):
    parts = tuple(part[None] for part in state)
    return parts if len(parts) == 2 else parts[0]


def assert_same(actual, expected, leaves):
    """Outputs, last states, and the gradients of a random sum of all."""
    assert len(actual) == len(expected)
    gradients = []
    for results in (actual, expected):
        torch.manual_seed(1)
        loss = sum((torch.randn(result.shape, dtype=result.dtype) * result).sum() for result in results)
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for ours, theirs in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_is_the_module(name):
    """Of torch, where nothing is masked."""
    cell, x, state = make(name, time=6)
    outputs, last = naive_scan(kind_of(cell), x, list(cell.parameters()), state=state)
    expected, final = cell(x, as_of_torch(state))
    final = final if isinstance(final, tuple) else (final,)
    assert_same([outputs, *last], [expected, *(part[0] for part in final)], [x, *state, *cell.parameters()])


@pytest.mark.parametrize("name", CELLS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_masked_scan_is_it(name, data):
    """With any mask, from any state."""
    cell, x, state = make(name, time=data.draw(st.integers(1, 9)))
    mask = bits(data, x)
    expected, last = naive_scan(kind_of(cell), x, list(cell.parameters()), mask=mask, state=state)
    outputs, final = scan_each_way(x, cell, mask, as_of_torch(state), None, needs_memory=True)
    assert_same([outputs, *(part[0] for part in final)], [expected, *last], [x, *state, *cell.parameters()])


@pytest.mark.parametrize("name", CELLS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_packed_sequences_are_it(name, data):
    """Wherever they begin, masked or not; each from a state of zero."""
    cell, x, _ = make(name, time=data.draw(st.integers(1, 9)))
    starts, mask = bits(data, x), data.draw(st.one_of(st.none(), st.just(...)))
    mask = None if mask is None else bits(data, x)
    starts[:, 0] = False
    expected, _ = naive_scan(kind_of(cell), x, list(cell.parameters()), mask=mask, starts=starts)
    outputs, _ = scan_each_way(x, cell, mask, None, starts, needs_memory=False)
    valid = torch.ones_like(starts) if mask is None else mask
    assert_same([outputs[valid]], [expected[valid]], [x, *cell.parameters()])


@pytest.mark.parametrize("name", CELLS)
def test_a_scan_in_chunks_is_it(name):
    """Of a length at which the scan is cut and run in parallel, in float32."""
    cell, x, _ = make(name, time=300)
    expected, _ = naive_scan(kind_of(cell), x, list(cell.parameters()))
    outputs, _ = scan_each_way(x.float(), cell.float(), None, None, None, needs_memory=True)
    torch.testing.assert_close(outputs, expected.float(), rtol=0, atol=1e-5)


def bits(data, x):
    rows, time = x.shape[:2]
    drawn = st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=rows, max_size=rows)
    return torch.tensor(data.draw(drawn))


@pytest.mark.parametrize("name", CELLS)
def test_states_after_every_step(name):
    """From which a later scan may start: an LSTM's memory stays as it is over masked steps, wherever they lie."""
    cell, x, state = make(name, time=7)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    outputs, _ = scan_each_way(x, cell, mask, as_of_torch(state), None, needs_memory=False)
    packed = packed_states(x, outputs, cell, mask=mask, state=as_of_torch(state))
    for time in range(7):
        _, last = naive_scan(
            kind_of(cell), x[:, : time + 1], list(cell.parameters()), mask=mask[:, : time + 1], state=state
        )
        torch.testing.assert_close(packed[:, time], torch.cat(last, dim=-1), rtol=0, atol=1e-11)
