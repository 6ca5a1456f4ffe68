"""The solver of partial transport: batches, masks, bad numbers, precision, gradients, and what is refused."""

import pytest
import torch
from transport_oracles import (
    capacities,
    central_differences,
    cosine_costs,
    linear_program,
    regularised_value,
)

from peft_read.pvla.transport import partial_transport


REG = 0.05


# Batches, masks and bad numbers


@pytest.mark.parametrize("solver", ["entropic", "exact"])
def test_batch_is_a_loop_of_singles(solver):
    """With a mass for each sample."""
    cost, mass = cosine_costs((12, 9), batch=5), torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0])
    together = partial_transport(cost, mass, solver=solver)
    for i in range(5):
        alone = partial_transport(cost[i : i + 1], mass[i].item(), solver=solver)
        torch.testing.assert_close([x[i] for x in together], [x[0] for x in alone], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", ["entropic", "exact"])
@pytest.mark.parametrize("marginals", ["unit", "uniform", "given"])
@pytest.mark.parametrize("garbage", [7.0, -1e9, torch.inf, torch.nan])
def test_padding_is_ignored(solver, marginals, garbage):
    """On any side, whatever lies in it: plan and gradient are those of the problem without it, and 0 in padding."""
    lengths, shape, generator = [(10, 6), (3, 6), (10, 2), (1, 1)], (10, 6), torch.Generator().manual_seed(0)
    frame_mask, word_mask = (
        torch.stack([torch.randperm(shape[side], generator=generator) < n[side] for n in lengths]) for side in (0, 1)
    )
    pairs = frame_mask[:, :, None] & word_mask[:, None, :]
    cost = cosine_costs(shape).masked_fill(~pairs, garbage).requires_grad_()
    given = tuple(torch.rand(4, n, generator=generator, dtype=torch.float64) + 0.1 for n in shape)
    padded = partial_transport(
        cost,
        0.6,
        0.1,
        frame_mask=frame_mask,
        word_mask=word_mask,
        marginals=given if marginals == "given" else marginals,
        solver=solver,
    )
    gradient = torch.autograd.grad(padded.cost.sum(), cost)[0]
    assert padded.plan[~pairs].eq(0).all()
    assert torch.equal(gradient, padded.plan)
    for i, (rows, columns) in enumerate(zip(frame_mask, word_mask, strict=True)):
        sides = (given[0][i : i + 1, rows], given[1][i : i + 1, columns])
        alone = partial_transport(
            cost.detach()[i : i + 1, rows][:, :, columns],
            0.6,
            0.1,
            marginals=sides if marginals == "given" else marginals,
            solver=solver,
        )
        torch.testing.assert_close(padded.plan[i][rows][:, columns], alone.plan[0], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(padded.cost[i], alone.cost[0], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(padded.residual[i], alone.residual[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("solver", ["entropic", "exact"])
def test_samples_without_a_frame_or_a_word(solver):
    """Exactly nothing: no plan, no cost, no residual, no gradient. Alone in a batch as well."""
    frame_mask, word_mask = torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    frame_mask[0] = word_mask[1] = frame_mask[2] = word_mask[2] = False
    cost = cosine_costs((5, 4)).requires_grad_()
    for rows in (slice(0, 4), slice(0, 3)):
        found = partial_transport(
            cost[rows], frame_mask=frame_mask[rows], word_mask=word_mask[rows], solver=solver, n_iter=100
        )
        gradient = torch.autograd.grad(found.cost.sum(), cost)[0]
        assert all(x[:3].eq(0).all() for x in found)
        assert gradient[:3].eq(0).all()
    whole = partial_transport(cost, frame_mask=frame_mask, word_mask=word_mask, solver=solver)
    torch.testing.assert_close(whole.plan[3], partial_transport(cost[3:], solver=solver).plan[0])
    given = (torch.zeros(4, 5), torch.ones(4, 4))
    assert all(x.eq(0).all() for x in partial_transport(cost, marginals=given, solver=solver))


@pytest.mark.parametrize("solver", ["entropic", "exact"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_shows_in_its_sample_only(solver, bad):
    """So that a gradient scaler sees it; the others don't differ in a bit."""
    cost = cosine_costs((8, 6))
    clean = partial_transport(cost, solver=solver)
    broken = cost.clone()
    broken[1, 3, 2] = bad
    found = partial_transport(broken, solver=solver)
    assert not found.cost[1].isfinite()
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[[0, 2, 3]], y[[0, 2, 3]])


def test_permuting_words_permutes_columns():
    """And frames rows."""
    cost = cosine_costs((20, 13))
    rows, columns = torch.randperm(20), torch.randperm(13)
    plan = partial_transport(cost).plan
    torch.testing.assert_close(
        partial_transport(cost[:, rows][:, :, columns]).plan, plan[:, rows][:, :, columns], rtol=1e-9, atol=1e-15
    )


def test_equal_costs_spread_the_mass_evenly():
    """Where all points are one, the plan is flat."""
    found = partial_transport(torch.zeros(1, 6, 4), 0.5)
    torch.testing.assert_close(found.plan, torch.full((1, 6, 4), 0.5 / 24))
    assert found.cost == 0


# Precision and gradients


def test_autocast_changes_nothing():
    """Products in half precision would lose the mass."""
    cost = cosine_costs((32, 16), dtype=torch.float32).requires_grad_()
    plain = partial_transport(cost)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = partial_transport(cost)
    for x, y in zip(found, plain, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


@pytest.mark.parametrize("solver", ["entropic", "exact"])
@pytest.mark.parametrize(
    ("given", "solved"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(given, solved, solver):
    """Half precision is solved in float32 and gets its gradient back in its own."""
    cost = cosine_costs((16, 8)).to(given).requires_grad_()
    found = partial_transport(cost, solver=solver)
    assert {x.dtype for x in found} == {solved}
    assert torch.equal(found.plan, partial_transport(cost.to(solved), solver=solver).plan)
    found.cost.sum().backward()
    torch.testing.assert_close(cost.grad, found.plan.to(given))


@pytest.mark.parametrize("size", [(8, 6), (5, 5)])
@pytest.mark.parametrize("marginals", ["unit", "uniform"])
@pytest.mark.parametrize("mass", [0.3, 0.7, 0.95, 1.0])
def test_gradient_is_that_of_the_regularised_value(size, marginals, mass):
    """Central differences of the value, worked out from converged plans."""
    cost, options = cosine_costs(size, batch=1).requires_grad_(), {"marginals": marginals, "n_iter": 200}
    found = partial_transport(cost, mass, 0.2, **options)
    assert found.residual < 1e-10
    found.cost.sum().backward()

    def value(x):
        return regularised_value(partial_transport(x, mass, 0.2, **options).plan, x, 0.2)

    torch.testing.assert_close(cost.grad, central_differences(value, cost.detach()), rtol=1e-6, atol=1e-8)
    assert not found.plan.requires_grad
    assert not found.residual.requires_grad


def test_gradient_has_no_gradient():
    """The plan is a constant to autograd, so a second derivative would be 0, which it isn't."""
    cost = cosine_costs((8, 8)).requires_grad_()
    (gradient,) = torch.autograd.grad(partial_transport(cost).cost.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("marginals", ["unit", "uniform"])
def test_exact_plan_is_the_gradient_of_the_programs_value(marginals):
    """A linear program's value is linear around a cost without ties."""
    cost, (a, b) = cosine_costs((6, 4), batch=1).requires_grad_(), capacities((6, 4), marginals)
    partial_transport(cost, 0.6, marginals=marginals, solver="exact").cost.sum().backward()

    def value(x):
        return torch.tensor([linear_program(sample.numpy(), a.numpy(), b.numpy(), 0.6) for sample in x]).double()

    torch.testing.assert_close(cost.grad, central_differences(value, cost.detach(), 1e-3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["entropic", "exact"])
def test_memory_does_not_depend_on_iterations(solver):
    """What the backward pass keeps is a plan."""
    saved = {}
    for n_iter in (1, 50, 200):
        sizes = []
        cost = cosine_costs((32, 16)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=sizes: (kept.append(x.numel()), x)[1], lambda x: x
        ):
            partial_transport(cost, n_iter=n_iter, solver=solver)
        saved[n_iter] = sum(sizes)
    assert saved[1] == saved[50] == saved[200] <= 3 * cost.numel()


def test_nothing_waits_for_the_device():
    """Tensors without values can't be looked at, and the whole path works on them."""
    with torch.device("meta"):
        masks = {"frame_mask": torch.ones(2, 9, dtype=torch.bool), "word_mask": torch.ones(2, 5, dtype=torch.bool)}
        cost, sides = torch.empty(2, 9, 5, requires_grad=True), (torch.empty(2, 9), torch.empty(2, 5))
        for mass in (0.5, torch.empty(2)):
            for marginals in ("unit", "uniform", sides):
                found = partial_transport(cost, mass, marginals=marginals, n_iter=11, **masks)
                assert [tuple(x.shape) for x in found] == [(2, 9, 5), (2,), (2,)]
                found.cost.sum().backward()


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.rand(6, 5)}, r"cost has shape \(6, 5\).*expected \(batch, frames, words\)"),
        ({"cost": torch.ones(2, 6, 5, dtype=torch.long)}, r"dtype torch.int64.*floats"),
        ({"frame_mask": torch.ones(2, 5)}, r"frame_mask has shape \(2, 5\); the cost has \(2, 6\)"),
        ({"word_mask": torch.ones(2, 6)}, r"word_mask has shape \(2, 6\); the cost has \(2, 5\)"),
        ({"mass": 0.0}, r"mass=0.0: expected a share of the mass in \(0, 1\]"),
        ({"mass": 1.01}, "mass=1.01"),
        ({"mass": float("nan")}, "mass=nan"),
        ({"mass": torch.tensor([0.5, 1.5])}, r"expected a share of the mass in \(0, 1\]"),
        ({"mass": torch.rand(3)}, r"mass has shape \(3,\); expected a number, or one for each of 2 samples"),
        ({"reg": 0.0}, "reg=0.0: expected a positive number.*solver='exact'"),
        ({"reg": -1.0}, "reg=-1.0"),
        ({"reg": float("nan")}, "reg=nan"),
        ({"n_iter": 0}, "n_iter=0: expected at least 1"),
        ({"solver": "simplex"}, "solver='simplex': expected 'entropic' or 'exact'"),
        ({"marginals": "equal"}, "marginals='equal': expected 'unit', 'uniform' or a pair of tensors"),
        (
            {"marginals": (torch.ones(2, 5), torch.ones(2, 5))},
            r"marginals of the frames have shape \(2, 5\), not \(2, 6\)",
        ),
        ({"marginals": (torch.ones(2, 6), torch.ones(5))}, r"marginals of the words have shape \(5,\), not \(2, 5\)"),
        ({"marginals": (torch.ones(2, 6), -torch.ones(2, 5))}, "marginals of the words have negative entries"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    """Told what came and what was expected."""
    with pytest.raises(ValueError, match=message):
        partial_transport(**{"cost": torch.rand(2, 6, 5), **change})
