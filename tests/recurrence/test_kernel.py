"""The Triton kernels against torch's modules in float64: on a GPU where there is one, else by Triton's interpreter."""

import copy
import functools
import os
import warnings

import pytest
import torch
from torch import nn
from triton_device import DEVICE, MARKS

from peft_read import recurrent_scan
from peft_read.kernels import SWITCH
from peft_read.recurrence import dispatch as eager
from peft_read.recurrence.module import Recurrence


# Exponentials that overflow give gates that are shut; what isn't a number stays so.
pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


CELLS = {"rnn": nn.RNN, "relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


WEIGHTS = {
    "as initialised": lambda w: w,
    "almost none": lambda w: 0.001 * nn.functional.normalize(w),
    "saturated": lambda w: 5 * torch.linalg.qr(w)[0],
    "never forgetting": lambda w: torch.linalg.qr(w)[0],
    "alternating": lambda w: -torch.eye(w.shape[1]).repeat(w.shape[0] // w.shape[1], 1),
}


SHORT = 4  # a chunk's steps where many chunks are wanted: the interpreter takes milliseconds for each


@pytest.fixture(autouse=True)
def kernel_scan(monkeypatch):
    """The kernels' module, for which every scan is sent to them."""
    monkeypatch.setenv(SWITCH, "triton")
    from peft_read.recurrence import chunked_triton as kernel_scan

    return kernel_scan


@pytest.fixture
def short_chunks(kernel_scan, monkeypatch):
    """Chunks, and guesses before them, so short that no guess is good enough."""
    monkeypatch.setattr(kernel_scan, "CHUNK", SHORT)
    monkeypatch.setattr(kernel_scan, "GUESS", SHORT)


def make(name, size=5, batch=2, time=14, weights="as initialised", **kwargs):
    torch.manual_seed(0)
    if name == "relu":
        kwargs["nonlinearity"] = "relu"
    cell = CELLS[name](size, size, batch_first=True, **kwargs)
    with torch.no_grad():
        for parameter_name, parameter in cell.named_parameters():
            if "weight_hh" in parameter_name:
                parameter.copy_(WEIGHTS[weights](parameter))
    directions = 2 if cell.bidirectional else 1
    x = 0.5 * torch.randn(batch, time, size)
    state = torch.randn(2, directions, batch, size)
    return cell, x, state


def results(function, cell, x, state, seed=1):
    """Outputs, final state and all gradients, of the kind of recurrence that `cell` is."""
    x, state = x.detach().requires_grad_(), state.detach().requires_grad_()
    outputs, final = function(x, cell, (state[0], state[1]) if isinstance(cell, nn.LSTM) else state[0])
    finals = final if isinstance(final, tuple) else (final,)
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed)).to(outputs)
    loss = (outputs * weight).sum() + sum(part.sin().sum() for part in finals)
    return [outputs, *finals, *torch.autograd.grad(loss, [x, state, *cell.parameters()])]


def check(cell, x, state, floor=1e-6):
    """The kernels give what torch's module gives in float64, as closely as that module itself in float32.

    Within a factor: where a rounding grows from step to step (with saturated weights), it's a matter of luck. An error
    up to `floor` of the largest value is allowed in any case.
    """
    module = functools.partial(results, lambda x, cell, state: cell(x, state))
    expected = module(copy.deepcopy(cell).double(), x.double(), state.double())
    theirs = module(cell, x, state)
    cell = cell.to(DEVICE)
    ours = results(lambda x, cell, s: recurrent_scan(x, cell, state=s), cell, x.to(DEVICE), state.to(DEVICE))
    for result, other, exact in zip(ours, theirs, expected, strict=True):
        error, usual = ((part.detach().cpu().double() - exact.detach()).abs().max() for part in (result, other))
        assert error <= 50 * usual + floor * exact.detach().abs().max().clamp(min=1)


# The interpreter takes seconds for each: there every cell meets some weights, and all weights meet some cell.
SOME = [
    ("rnn", "as initialised"), ("rnn", "never forgetting"), ("relu", "saturated"), ("relu", "alternating"),
    ("gru", "as initialised"), ("gru", "saturated"), ("lstm", "almost none"), ("lstm", "never forgetting"),
]  # fmt: skip


ALL = [(name, weights) for name in CELLS for weights in WEIGHTS]


@pytest.mark.parametrize(("name", "weights"), SOME if DEVICE == "cpu" else ALL)
def test_equals_the_module_in_double_precision(name, weights, short_chunks):
    """Outputs, final state and all gradients, over chunks that all have to run again."""
    check(*make(name, weights=weights))


@pytest.mark.parametrize(
    ("name", "rounds", "weights"),
    [
        ("rnn", 0, "never forgetting"),
        ("relu", 1, "as initialised"),
        ("gru", 1, "never forgetting"),
        ("lstm", 0, "as initialised"),
    ],
)
def test_what_is_left_after_the_rounds_is_mended(name, rounds, weights, short_chunks, kernel_scan, monkeypatch):
    """By the last program of a sequence; more chunks than it looks at together."""
    from peft_read.recurrence import triton_chunks as kernel_chunks

    monkeypatch.setattr(kernel_scan, "ROUNDS", rounds)
    if os.environ.get("TRITON_INTERPRET") == "1":  # what is compiled keeps the number that it has seen
        monkeypatch.setattr(kernel_chunks.BLOCK, "value", 2)
    check(*make(name, batch=2 if name == "rnn" else 1, time=21, weights=weights))


@pytest.mark.parametrize("time", [2, 3, 4, 5, 8, 9])
def test_any_length(time, short_chunks):
    """Whole chunks, parts of one, and those few that need no rounds."""
    check(*make("rnn" if time > 3 else "gru", batch=1, time=time))


@pytest.mark.parametrize(("name", "size"), [("rnn", 1), ("gru", 16), ("lstm", 17)])
def test_any_width(name, size, short_chunks):
    """States are padded to a power of two."""
    check(*make(name, size=size, batch=1, time=9))


def test_chunks_of_the_real_length():
    """As users have them, the last of which begins with a guess."""
    check(*make("rnn", batch=1, time=81))


def test_chunks_grow_where_there_are_many(kernel_scan, monkeypatch):
    """Up to a limit; what they give stays the same."""
    states = torch.zeros(8, 2048, 32)
    lengths = [kernel_scan._Run("gru", states.repeat(n, 1, 1), backward=False).length for n in (1, 3, 30)]
    assert lengths == [32, 64, 128]
    monkeypatch.setattr(kernel_scan, "CHUNK", SHORT)
    monkeypatch.setattr(kernel_scan, "MANY_WARPS", 1)
    monkeypatch.setattr(kernel_scan, "LONGEST_CHUNK", 2 * SHORT)
    check(*make("rnn", time=17))


@pytest.mark.parametrize("name", CELLS)
def test_without_biases_or_an_initial_state(name, short_chunks):
    """Where nothing is given, nothing is read; and there is no gradient for it."""
    cell, x, _ = make(name, bias=False, time=9)
    x.requires_grad_()
    expected = torch.autograd.grad(cell(x)[0].square().sum(), [x, *cell.parameters()])
    outputs, final = recurrent_scan(x.to(DEVICE), cell.to(DEVICE))
    assert all(part.shape == (1, 2, 5) for part in (final if name == "lstm" else [final]))
    found = torch.autograd.grad(outputs.square().sum(), [x, *cell.parameters()])
    torch.testing.assert_close([grad.cpu() for grad in found], [grad.cpu() for grad in expected])


def test_gradients_of_the_final_state_alone(short_chunks):
    """Of an LSTM's memory, which isn't among the outputs."""
    cell, x, _ = make("lstm", time=9)
    x.requires_grad_()
    expected = torch.autograd.grad(cell(x)[1][1].square().sum(), [x, *cell.parameters()])
    _, (_, memory) = recurrent_scan(x.to(DEVICE), cell.to(DEVICE))
    found = torch.autograd.grad(memory.square().sum(), [x, *cell.parameters()])
    torch.testing.assert_close([grad.cpu() for grad in found], [grad.cpu() for grad in expected])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after another, and takes long")
@pytest.mark.parametrize("keeps", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_many_programs_at_once(name, keeps):
    """Recurrences that forget at once, in several rounds, and never; the results of two runs don't differ in a bit."""
    cell, x, state = make(name, size=32, batch=40, time=1500)
    with torch.no_grad():
        if name == "rnn":
            cell.weight_hh_l0.copy_(keeps * torch.linalg.qr(cell.weight_hh_l0)[0])
        elif keeps > 0:  # the gate that keeps the state, or memory
            cell.bias_hh_l0[32:64] = torch.logit(torch.tensor(keeps).clamp(max=0.9999))
    check(cell, x, state)
    runs = [results(lambda x, cell, s: recurrent_scan(x, cell, state=s), cell, x.cuda(), state.cuda()) for _ in "12"]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_at_the_last_step_alone(short_chunks):
    """It reaches the first steps through all chunks: no part of it may be taken for zero too early."""
    cell, x, state = make("rnn", batch=1, time=21, weights="never forgetting")

    def last(function, cell, x, state):
        x = x.detach().requires_grad_()
        outputs, _ = function(x, cell, state)
        return torch.autograd.grad(outputs[:, -1].sum(), x)[0]

    expected = last(lambda x, c, s: c(x, s), copy.deepcopy(cell).double(), x.double(), state[0].double())
    ours = last(lambda x, c, s: recurrent_scan(x, c, state=s), cell.to(DEVICE), x.to(DEVICE), state[0].to(DEVICE))
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_masks_and_both_directions(name, short_chunks):
    """Padding and holes: each row's valid steps alone, in either direction."""
    cell, x, _ = make(name, time=11, bidirectional=True)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = mask[1, 3] = mask[1, 8:] = False
    outputs, _ = recurrent_scan(x.to(DEVICE), cell.to(DEVICE), mask=mask.to(DEVICE))
    double = copy.deepcopy(cell).cpu().double()
    for row in range(2):
        alone, _ = double(x[row : row + 1, mask[row]].double())
        torch.testing.assert_close(outputs[row, mask[row].to(DEVICE)].cpu().double(), alone[0], rtol=0, atol=1e-6)


def test_half_precision_input_keeps_a_float32_state():
    """Only input and output are rounded; in inference mode too."""
    cell, x, _ = make("gru", time=5)
    cell = cell.to(DEVICE)
    with torch.inference_mode():
        outputs, final = recurrent_scan(x.bfloat16().to(DEVICE), cell)
        expected, _ = recurrent_scan(x.bfloat16().float().to(DEVICE), cell)
    assert final.dtype == torch.float32
    assert torch.equal(outputs, expected.bfloat16())


@pytest.mark.parametrize("name", CELLS)
def test_what_is_not_a_number_stays_so(name, short_chunks):
    """From the step where it comes up to the last, through chunks whose guess knows nothing of it; and no further."""
    cell, x, _ = make(name, time=17)
    x[0, 2] = torch.nan
    cell, x = cell.to(DEVICE), x.to(DEVICE).requires_grad_()
    outputs, _ = recurrent_scan(x, cell)
    assert outputs[0, 2:].isnan().all()
    assert outputs[0, :2].isfinite().all()
    assert outputs[1].isfinite().all()
    grad = torch.ones_like(outputs)
    grad[1, 14] = torch.nan
    (grad,) = torch.autograd.grad(outputs, x, grad)
    assert grad[1, :15].isnan().all()
    assert grad[1, 15:].isfinite().all()


def test_states_that_overflow(short_chunks):
    """An unbounded recurrence may: then no guess is good enough."""
    cell, x, _ = make("relu", batch=1, time=17)
    with torch.no_grad():
        cell.weight_hh_l0.fill_(1e4)
        cell.weight_ih_l0.abs_()  # nothing negative: infinities stay, where a difference of two isn't a number
        expected, _ = cell(x.abs())
        outputs, _ = recurrent_scan(x.abs().to(DEVICE), cell.to(DEVICE))
    assert torch.equal(outputs.cpu().isinf(), expected.isinf())
    assert expected[:, 12:].isinf().all()


def test_a_gpu_on_which_they_fail_is_told(monkeypatch, short_chunks):
    """torch's kernels run there, after one warning that says why."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(eager, "TRIAL_STEPS", 10)
    device = torch.device(DEVICE)
    trial = eager._passes_trial.__wrapped__
    assert all(trial(kind, 16, device) for kind in eager.GATES)
    by_kernel = eager._scan_by_kernel
    monkeypatch.setattr(eager, "_scan_by_kernel", lambda *args: [1.1 * part for part in by_kernel(*args)])
    with pytest.warns(UserWarning, match="don't run on a GPU .they give other results"):
        assert not trial("rnn_tanh", 16, device)
    monkeypatch.setattr(eager, "_scan_by_kernel", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match=f"ZeroDivisionError.*Set {SWITCH}=torch"):
        assert not trial("rnn_tanh", 16, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not trial("rnn_tanh", 16, device)


def test_the_switch(monkeypatch):
    """It forces either path; what can't be forced is said."""
    cell, x, _ = make("gru", time=3)
    called = []
    from peft_read.recurrence import chunked_triton as kernel_scan

    original = kernel_scan.KernelScan.apply
    monkeypatch.setattr(kernel_scan.KernelScan, "apply", lambda *args: called.append(1) or original(*args))
    recurrent_scan(x.to(DEVICE), cell.to(DEVICE))
    assert called == [1]
    monkeypatch.setenv(SWITCH, "torch")
    recurrent_scan(x.to(DEVICE), cell)
    assert called == [1]
    monkeypatch.delenv(SWITCH)
    recurrent_scan(x, cell.cpu())
    assert called == [1]
    monkeypatch.setenv(SWITCH, "cuda")
    with pytest.raises(ValueError, match=f"{SWITCH} must be auto, torch or triton, got 'cuda'"):
        recurrent_scan(x, cell)
    monkeypatch.setenv(SWITCH, "triton")
    with pytest.raises(ValueError, match=r"float32, and this is in torch\.float64"):
        recurrent_scan(x.double().to(DEVICE), cell.double().to(DEVICE))
    with pytest.raises(ValueError, match="at most 128 states, and the recurrence has 129"):
        recurrent_scan(torch.zeros(1, 2, 129, device=DEVICE), nn.RNN(129, 129, batch_first=True).to(DEVICE))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU, and this is on cpu"):
        recurrent_scan(x, cell.float().cpu())


@pytest.mark.parametrize("name", CELLS)
def test_without_tf32_torch_s_kernel_is_called_as_ever(name, monkeypatch):
    """Same results and gradients; the setting is the strict one in both passes, and as it was between them."""
    cell, x, state = make(name, time=6)
    setting, seen = torch.backends.cudnn.rnn, []
    assert setting.fp32_precision == "tf32"  # torch's default
    original = eager._run_torch

    def spy(*args):
        outputs = original(*args)
        seen.append(setting.fp32_precision)
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda grad: seen.append(setting.fp32_precision))
        return outputs

    monkeypatch.setattr(eager, "_run_torch", spy)

    def run(x, cell, state):
        start = [state[0], state[1]] if isinstance(cell, nn.LSTM) else [state]
        kind = "rnn_relu" if name == "relu" else "rnn_tanh" if name == "rnn" else name
        outputs, *final = eager._WithoutTF32.apply(kind, len(start), x, *start, *cell.parameters())
        return outputs, tuple(final) if len(final) > 1 else final[0]

    expected = results(lambda x, cell, state: cell(x, state), cell, x, state)
    torch.testing.assert_close(results(run, cell, x, state), expected, rtol=1e-6, atol=1e-6)
    assert seen == ["ieee", "ieee"]
    with torch.no_grad():
        assert not run(x, cell, (state[0], state[1]) if name == "lstm" else state[0])[0].requires_grad
    assert setting.fp32_precision == "tf32"


@pytest.mark.skipif(DEVICE == "cpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("name", CELLS)
def test_cudnn_is_as_exact(name, monkeypatch):
    """What runs where the kernels can't: in float32, not in TF32, which would be a hundred times as far off."""
    monkeypatch.setenv(SWITCH, "torch")
    check(*make(name, size=16, time=300), floor=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_cudnn_finds_the_weights_as_it_wants_them(kind, monkeypatch):
    """In one piece of memory; it warns otherwise, and copies them at every call."""
    monkeypatch.setenv(SWITCH, "torch")
    cell, x = Recurrence(kind, 16).to(DEVICE), torch.randn(2, 9, 16, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recurrent_scan(x, cell)[0].sum().backward()
