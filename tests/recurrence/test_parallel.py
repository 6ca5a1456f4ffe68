"""The scan in chunks is the sequential scan: any length, any weights, also those that never forget."""

import pytest
import torch
from torch import nn

from peft_read import recurrent_scan
from peft_read.recurrence import chunks
from peft_read.recurrence.chunks import Chunks


CELLS = [nn.RNN, nn.GRU]
WEIGHTS = {
    "as initialised": lambda w: w,
    "almost none": lambda w: 0.001 * torch.nn.functional.normalize(w),
    "saturated": lambda w: 5 * torch.linalg.qr(w)[0],
    "never forgetting": lambda w: torch.linalg.qr(w)[0],
    "alternating": lambda w: -torch.eye(w.shape[1], dtype=w.dtype).repeat(w.shape[0] // w.shape[1], 1),
}


def make(cell_cls, time, weights="as initialised", scale=1.0):
    torch.manual_seed(0)
    cell = cell_cls(4, 4, batch_first=True).double()
    with torch.no_grad():
        cell.weight_hh_l0.copy_(WEIGHTS[weights](cell.weight_hh_l0))
    x = (scale * torch.randn(3, time, 4, dtype=torch.float64)).requires_grad_()
    start = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    return cell, x, start


def results(function, cell, x, start):
    outputs, final = function(x, cell, start)
    weight = torch.linspace(-1, 1, outputs.numel(), dtype=x.dtype).view_as(outputs)
    grads = torch.autograd.grad((outputs * weight).sum() + final.sum(), [x, start, *cell.parameters()])
    return [outputs, final, *grads]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("time", [1, 31, 127, 128, 129, 301])
@pytest.mark.parametrize("cell_cls", CELLS)
def test_equals_the_sequential_module(cell_cls, time, weights):
    """Outputs, final state and all gradients, in float64 against torch's own; small inputs, so that states last."""
    cell, x, start = make(cell_cls, time, weights, scale=0.1)
    ours = results(lambda x, cell, start: recurrent_scan(x, cell, state=start), cell, x, start)
    theirs = results(lambda x, cell, start: cell(x, start), cell, x, start)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()))


@pytest.mark.parametrize("cell_cls", CELLS)
def test_a_mask_and_chunks_together(cell_cls):
    """Holes and padding on both sides of long rows equal the rows alone."""
    cell, x, start = make(cell_cls, 150)
    mask = torch.rand(3, 150) < 0.7
    mask[0, :80] = False
    mask[1, 90:] = False
    outputs, final = recurrent_scan(x, cell, mask=mask, state=start)
    for row in range(3):
        alone, alone_final = cell(x[row : row + 1, mask[row]], start[:, row : row + 1].contiguous())
        assert torch.allclose(outputs[row, mask[row]], alone[0], atol=1e-10)
        assert torch.allclose(final[:, row], alone_final[:, 0], atol=1e-10)


@pytest.mark.parametrize("cell_cls", [*CELLS, nn.LSTM])
def test_training_after_inference(cell_cls):
    """What is kept of one call for the next of its shape may come from inference mode."""
    cell = cell_cls(4, 4, batch_first=True)
    x, mask = torch.randn(5, 133, 4), torch.rand(5, 133) < 0.7
    with torch.inference_mode():
        expected, _ = recurrent_scan(x, cell, mask=mask)
    outputs, _ = recurrent_scan(x.requires_grad_(), cell, mask=mask)
    assert torch.equal(outputs, expected)
    outputs.sum().backward()
    assert x.grad[mask].abs().max() > 0
    assert x.grad[~mask].abs().max() == 0


@pytest.fixture
def runs(monkeypatch):
    """Rows and steps of every run of a recurrence over chunks."""
    seen = []
    original = Chunks.settle

    def watched(self, run, tensors, start, **kwargs):
        def counted(states, steps):
            seen.append((len(states), len(steps)))
            return run(states, steps)

        return original(self, counted, tensors, start, **kwargs)

    monkeypatch.setattr(Chunks, "settle", watched)
    return seen


@pytest.mark.parametrize("cell_cls", CELLS)
@pytest.mark.parametrize("time", [1024, 16384])
def test_a_recurrence_that_forgets_takes_few_rounds(cell_cls, time, runs):
    """The point of it: as initialised, a long scan takes as many steps as a few chunks have, in either direction."""
    cell, x, start = make(cell_cls, time)
    ours = results(lambda x, cell, start: recurrent_scan(x, cell, state=start), cell, x, start)
    assert min(rows for rows, _ in runs) > len(x)
    assert sum(steps for _, steps in runs) <= 2 * 4 * chunks.LONGEST_CHUNK
    for a, b in zip(ours, results(lambda x, cell, start: cell(x, start), cell, x, start), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()))


def test_a_recurrence_that_never_forgets_falls_back(runs):
    """The worst case is the sequential scan after a bounded number of rounds, not one round per chunk."""
    x = torch.ones(2, 1024, 3, dtype=torch.float64)
    cut = Chunks(x, 4)
    sums = cut.cut(torch.zeros_like(x))

    def add_up(total, steps):
        for step, after in steps:
            total = after.copy_(total + step)
        return total

    starts, ends = cut.settle(add_up, (cut.cut(x), sums), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(cut.join(sums), x.cumsum(1))
    assert torch.equal(starts[2:], ends[:-2])
    assert runs == [(2 * cut.count, cut.length)] * chunks.MOST_ROUNDS + [(2, cut.length)] * cut.count


@pytest.mark.parametrize(("batch", "time"), [(3, 5), (2, 127), (2, 128), (1, 300), (40, 4097)])
def test_what_is_cut_is_joined_again(batch, time):
    """Short sequences stay whole; the last chunk may be partly empty, also for gradients."""
    x = torch.randn(batch, time, 2)
    cut = Chunks(x, 4)
    assert torch.equal(cut.join(cut.cut(x)), x)
    torch.testing.assert_close(cut.cut_gradient(x).sum((0, 1)), x.sum((0, 1)), rtol=0, atol=1e-3)
    assert (cut.count == 1) == (time < 4 * chunks.CHUNK)
    assert Chunks(x, 8 * time).count == 1


def test_gradients_are_central_differences():
    """The written-out backward passes across chunk borders."""
    for cell_cls in CELLS:
        cell, x, start = make(cell_cls, 130)
        short = x[:1].detach().requires_grad_()
        begin = start[:, :1].detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, s, c=cell: recurrent_scan(x, c, state=s)[0], (short, begin))
