"""The scan in chunks is the sequential scan: any length, any weights, also those that never forget."""

import pytest
import torch
from torch import nn

from peft_read import recurrent_scan
from peft_read.read import parallel


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
@pytest.mark.parametrize("time", [1, 31, 63, 64, 65, 96, 301])
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


@pytest.mark.parametrize("cell_cls", CELLS)
def test_a_recurrence_that_forgets_takes_few_rounds(cell_cls, monkeypatch):
    """The point of it: as initialised, a long scan never falls back to one step after another."""
    lengths = []
    original = parallel.in_chunks

    def counted(loop, start, steps):
        def watched(start, steps):
            lengths.append(len(steps[0]))
            return loop(start, steps)

        return original(watched, start, steps)

    monkeypatch.setattr(parallel, "in_chunks", counted)
    cell, x, start = make(cell_cls, 1024)
    results(lambda x, cell, start: recurrent_scan(x, cell, state=start), cell, x, start)
    assert set(lengths) == {parallel.CHUNK}
    assert len(lengths) <= 2 * parallel.MOST_ROUNDS


def test_a_recurrence_that_never_forgets_falls_back(monkeypatch):
    """The worst case is the sequential scan after a bounded number of rounds, not one round per chunk."""
    calls = []

    def counts(start, steps):
        calls.append(len(steps[0]))
        states = torch.cumsum(steps[0], 0) + start
        return states[-1], [states]

    steps = torch.ones(1024, 2, 3, dtype=torch.float64)
    (states,) = parallel.in_chunks(counts, torch.zeros(2, 3, dtype=torch.float64), [steps])
    assert torch.equal(states[:, 0, 0], torch.arange(1, 1025, dtype=torch.float64))
    assert calls == [parallel.CHUNK] * parallel.MOST_ROUNDS + [1024]


def test_gradients_are_central_differences():
    """The written-out backward passes across chunk borders."""
    for cell_cls in CELLS:
        cell, x, start = make(cell_cls, 70)
        short = x[:1, :, :].detach().requires_grad_()
        begin = start[:, :1].detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, s, c=cell: recurrent_scan(x, c, state=s)[0], (short, begin))
