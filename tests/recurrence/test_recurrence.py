"""The masked scan against torch's own modules, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_read import recurrent_scan


CELLS = [nn.RNN, nn.GRU, nn.LSTM]


def make(cell_cls, size=5, batch=3, time=7, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    cell = cell_cls(size, size, batch_first=True, **kwargs).to(dtype)
    directions = 2 if cell.bidirectional else 1
    x = torch.randn(batch, time, size, dtype=dtype, requires_grad=True)
    hidden = torch.randn(directions, batch, size, dtype=dtype, requires_grad=True)
    state = (hidden, hidden.detach().flip(0) + 0.5) if cell_cls is nn.LSTM else hidden
    return cell, x, state


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def rows(state, row):
    chosen = tuple(part[:, row : row + 1].contiguous() for part in parts(state))
    return chosen if isinstance(state, tuple) else chosen[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_cls", [*CELLS, "relu"])
def test_equals_the_module(cell_cls, bidirectional, bias):
    """Without a mask: outputs, final state and every gradient are the module's own."""
    kwargs = {"nonlinearity": "relu"} if cell_cls == "relu" else {}
    cell, x, state = make(nn.RNN if cell_cls == "relu" else cell_cls, bidirectional=bidirectional, bias=bias, **kwargs)
    results = [recurrent_scan(x, cell, state=state), cell(x, state)]
    weight = torch.randn_like(results[0][0])
    leaves = [x, parts(state)[0], *cell.parameters()]
    grads = []
    for outputs, final in results:
        loss = (outputs * weight).sum() + sum(part.sin().sum() for part in parts(final))
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(
        (results[0][0], *parts(results[0][1])), (results[1][0], *parts(results[1][1])), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_cls", CELLS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_padded_batch_equals_its_rows_alone(cell_cls, bidirectional, data):
    """Padding on either side, in holes or everywhere: outputs, state and input gradients of the valid steps."""
    cell, x, state = make(cell_cls, bidirectional=bidirectional)
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=3, max_size=3)))
    outputs, final = recurrent_scan(x, cell, mask=mask, state=state)
    weight = torch.randn_like(outputs)
    (grad,) = torch.autograd.grad((outputs * weight)[mask].sum(), x, allow_unused=True, retain_graph=True)
    for row in range(3):
        valid = mask[row]
        if not valid.any():
            assert all(
                torch.equal(got[:, row], start[:, row]) for got, start in zip(parts(final), parts(state), strict=True)
            )
            continue
        alone, alone_final = cell(x[row : row + 1, valid], rows(state, row))
        assert torch.allclose(outputs[row, valid], alone[0], atol=1e-12)
        for got, expected in zip(parts(final), parts(alone_final), strict=True):
            assert torch.allclose(got[:, row], expected[:, 0], atol=1e-12)
        (expected,) = torch.autograd.grad((alone[0] * weight[row, valid]).sum(), x)
        assert torch.allclose(grad[row], expected[row], atol=1e-11)


@pytest.mark.parametrize("cell_cls", CELLS)
def test_a_padded_step_repeats_the_one_before(cell_cls):
    """What decoding relies on: the last column holds every row's newest state."""
    cell, x, state = make(cell_cls)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    outputs, final = recurrent_scan(x, cell, mask=mask, state=state)
    assert torch.equal(outputs[0, 0], parts(state)[0][0, 0])
    assert torch.equal(outputs[0, 2], outputs[0, 1])
    assert torch.equal(outputs[:, -1], parts(final)[0][0])


@pytest.mark.parametrize("cell_cls", CELLS)
def test_two_halves_equal_the_whole(cell_cls):
    """The returned state continues where the first half ended."""
    cell, x, _ = make(cell_cls)
    whole, final = recurrent_scan(x, cell)
    first, state = recurrent_scan(x[:, :4], cell)
    second, end = recurrent_scan(x[:, 4:], cell, state=state)
    assert torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(parts(end), parts(final), strict=True))


@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("cell_cls", CELLS)
def test_gradients_are_central_differences(cell_cls, time):
    """The backward passes that are written out, also for one step, where the recurrent matrix gets zero."""
    cell, x, state = make(cell_cls, size=3, batch=2, time=time)
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, 0] = time == 1
    names, weights = zip(*cell.named_parameters(), strict=True)

    def outputs(x, hidden, *weights):
        copy = cell_cls(3, 3, batch_first=True).double()
        for name, weight in zip(names, weights, strict=True):
            del copy._parameters[name]
            setattr(copy, name, weight)
        start = (hidden, state[1]) if cell_cls is nn.LSTM else hidden
        result, final = recurrent_scan(x, copy, mask=mask, state=start)
        return (result, *parts(final))

    assert torch.autograd.gradcheck(outputs, (x, parts(state)[0], *weights))


@pytest.mark.parametrize("cell_cls", CELLS)
def test_half_precision_input_keeps_a_float32_state(cell_cls):
    """A bfloat16 state would drift; only input and output are rounded."""
    cell, x, _ = make(cell_cls, time=64, dtype=torch.float32)
    half = x.detach().bfloat16()
    outputs, final = recurrent_scan(half, cell.bfloat16())
    expected, expected_final = recurrent_scan(half.float(), cell.float())
    assert outputs.dtype == torch.bfloat16
    assert parts(final)[0].dtype == torch.float32
    assert torch.equal(outputs, expected.bfloat16())
    assert torch.equal(parts(final)[0], parts(expected_final)[0])


@pytest.mark.parametrize("cell_cls", CELLS)
def test_autocast_changes_nothing(cell_cls):
    """The recurrence is computed in float32 whatever surrounds it."""
    cell, x, _ = make(cell_cls, dtype=torch.float32)
    expected = recurrent_scan(x, cell)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recurrent_scan(x, cell)[0], expected)


@pytest.mark.parametrize("time", [7, 200])
@pytest.mark.parametrize("cell_cls", CELLS)
def test_a_backward_pass_under_autocast(cell_cls, time):
    """Who calls it there gets float32 gradients too, and the same ones twice."""
    cell, x, _ = make(cell_cls, time=time, dtype=torch.float32)
    outputs = recurrent_scan(x, cell)[0]
    expected = torch.autograd.grad(outputs.sum(), [x, *cell.parameters()], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(outputs.sum(), [x, *cell.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("cell_cls", CELLS)
def test_padding_may_hold_anything(cell_cls):
    """What isn't a number there reaches neither outputs nor gradients."""
    cell, x, state = make(cell_cls)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 1]], dtype=torch.bool)
    padded = torch.where(mask[..., None], x, torch.nan).detach().requires_grad_()
    outputs, final = recurrent_scan(padded, cell, mask=mask, state=state)
    expected, expected_final = recurrent_scan(x, cell, mask=mask, state=state)
    assert torch.equal(outputs, expected)
    assert all(torch.equal(a, b) for a, b in zip(parts(final), parts(expected_final), strict=True))
    grads = torch.autograd.grad(outputs.sum(), [padded, *cell.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("cell_cls", CELLS)
def test_trains_in_eval_mode_and_runs_without_gradients(cell_cls):
    """Frozen bases are often in eval mode; inference mode needs no graph."""
    cell, x, _ = make(cell_cls)
    cell.eval()
    recurrent_scan(x, cell)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in cell.parameters())
    with torch.inference_mode():
        outputs, _ = recurrent_scan(x, cell)
    assert torch.allclose(outputs, cell(x)[0], atol=1e-12)


@pytest.mark.parametrize("time", [7, 200])
@pytest.mark.parametrize("cell_cls", [nn.RNN, nn.GRU])
def test_the_bits_do_not_depend_on_what_is_trained(cell_cls, time):
    """A saved adapter, loaded for inference, gives exactly what it gave when it was trained."""
    cell, x, _ = make(cell_cls, time=time, dtype=torch.float32)
    trained = recurrent_scan(x, cell)[0]
    with torch.no_grad():
        assert torch.equal(recurrent_scan(x, cell)[0], trained)
    cell.requires_grad_(False)
    assert torch.equal(recurrent_scan(x.detach(), cell)[0], trained)


def test_a_second_derivative_is_refused():
    """The written-out backward passes can't be differentiated again; silence would be a wrong number."""
    cell, x, _ = make(nn.GRU)
    (grad,) = torch.autograd.grad(recurrent_scan(x, cell)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_arguments_are_refused():
    """Each error names the argument, what came and what was expected."""
    cell, x, _ = make(nn.GRU)
    with pytest.raises(TypeError, match=r"nn\.RNN, nn\.GRU or nn\.LSTM, got Linear"):
        recurrent_scan(x, nn.Linear(5, 5))
    with pytest.raises(ValueError, match="num_layers=2"):
        recurrent_scan(x, nn.GRU(5, 5, 2, batch_first=True))
    with pytest.raises(ValueError, match="batch_first=False"):
        recurrent_scan(x, nn.GRU(5, 5))
    with pytest.raises(ValueError, match="proj_size=2"):
        recurrent_scan(x, nn.LSTM(5, 5, batch_first=True, proj_size=2))
    with pytest.raises(ValueError, match=r"`x` must be \(batch, time, 5\), got shape \(3, 7, 4\)"):
        recurrent_scan(x[..., :4], cell)
    with pytest.raises(TypeError, match=r"`mask` must be boolean.*int64"):
        recurrent_scan(x, cell, mask=torch.ones(3, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`mask` must be .* \(3, 7\), got \(7, 3\)"):
        recurrent_scan(x, cell, mask=torch.ones(7, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`state` of this GRU .* \(1, 3, 5\)"):
        recurrent_scan(x, cell, state=torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="at least one row and one step"):
        recurrent_scan(x[:, :0], cell)
