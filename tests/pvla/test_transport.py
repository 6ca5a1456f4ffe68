"""The solver of partial transport: against POT, Dykstra's algorithm written out, linear programs and differences."""

import ot
import pytest
import torch
from transport_oracles import (
    SIZES,
    assert_feasible,
    capacities,
    cosine_costs,
    linear_program,
    pot_entropic,
    relative_error,
)

from peft_read.pvla.naive import naive_partial_transport
from peft_read.pvla.transport import partial_transport


REG = 0.05


# The minimiser


@pytest.mark.parametrize("marginals", ["unit", "uniform"])
@pytest.mark.parametrize(
    ("size", "mass"),
    [((8, 8), m) for m in (0.1, 0.3, 0.5, 0.75, 1.0)]
    + [((32, 16), m) for m in (0.1, 0.5, 0.9)]
    + [((75, 32), m) for m in (0.1, 0.5)]
    + [((256, 64), 0.5)],
)
def test_converged_plan_is_that_of_pot(size, mass, marginals):
    """POT stores three corrections a matrix each and loops in Python; a reg at which both converge in good time."""
    cost, (a, b) = cosine_costs(size, batch=1), capacities(size, marginals)
    reg = 0.2 if size == (8, 8) else 0.1
    found = partial_transport(cost, mass, reg, marginals=marginals, n_iter=1000)
    expected = pot_entropic(cost[0], a, b, mass, reg, n_iter=1500 if size == (256, 64) else 4000)
    assert relative_error(found.plan, expected[None]) < 1e-4
    assert_feasible(found.plan, a, b, mass)
    assert found.residual < 1e-9


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (32, 16)])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 1.0])
def test_converged_plan_is_that_of_dykstras_algorithm(size, mass):
    """The definition; cyclic projections without corrections end elsewhere."""
    cost, (a, b) = cosine_costs(size, batch=1, seed=1), capacities(size, "unit")
    found = partial_transport(cost, mass, 0.2, n_iter=1000).plan
    assert relative_error(found, naive_partial_transport(cost[0], a, b, mass, 0.2, n_iter=4000)[None]) < 1e-6


def test_given_marginals_are_capacities():
    """Other sums on both sides, zeros among them: the mass is a share of the lesser sum, nothing moves at a zero."""
    cost, a, b = cosine_costs((9, 6), batch=2), torch.rand(2, 9) + 0.1, torch.rand(2, 6) + 0.1
    a[0, 2] = b[1, 0] = b[0, 4:] = 0
    a, b = a.double(), b.double()
    total = 0.6 * torch.minimum(a.sum(1), b.sum(1))
    found = partial_transport(cost, 0.6, 0.2, marginals=(a, b), n_iter=500)
    assert_feasible(found.plan, a, b, total)
    for i in range(2):
        rows, columns = a[i] > 0, b[i] > 0
        points = cost[i][rows][:, columns]
        expected = naive_partial_transport(points, a[i][rows], b[i][columns], total[i], 0.2, n_iter=3000)
        assert relative_error(found.plan[i][rows][:, columns][None], expected[None]) < 1e-6
    assert found.plan[0, 2].eq(0).all()
    assert found.plan[0, :, 4:].eq(0).all()
    assert found.plan[1, :, 0].eq(0).all()


@pytest.mark.parametrize("size", [(8, 8), (31, 17)])
def test_all_mass_between_uniform_sides_is_plain_sinkhorn(size):
    """Nothing is partial then."""
    cost, (a, b) = cosine_costs(size, batch=1), capacities(size, "uniform")
    found = partial_transport(cost, 1.0, 0.1, marginals="uniform", n_iter=1000).plan
    expected = ot.sinkhorn(a, b, cost[0], 0.1, stopThr=1e-13, numItermax=10_000)
    assert relative_error(found, expected[None]) < 1e-6


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("marginals", ["unit", "uniform"])
def test_cost_tends_to_the_linear_programs(size, marginals):
    """Under 1 % above it at a tenth of the usual reg, and never below."""
    cost = cosine_costs(size, batch=1 if size == (256, 64) else 2)
    for mass in (0.25, 0.5, 1.0):
        exact = partial_transport(cost, mass, marginals=marginals, solver="exact")
        found = partial_transport(cost, mass, 5e-3, marginals=marginals, n_iter=1500)
        assert found.residual.max() < 1e-3
        assert (found.cost < 1.01 * exact.cost).all()
        # An unconverged plan exceeds capacities by its residual; each unit of that may be worth the spread of costs.
        assert (found.cost > exact.cost - found.residual * mass * 2).all()


# Fifty iterations in float32


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("marginals", ["unit", "uniform"])
def test_fifty_iterations_do(size, dim, marginals):
    """Plan error and constraints at the defaults, at every mass, those next to 1 included."""
    few = size == (256, 64)
    cost, (a, b) = cosine_costs(size, dim, batch=2 if few else 4), capacities(size, marginals)
    for mass in (0.1, 0.5, 0.99, 1.0) if few else (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0):
        found = partial_transport(cost.float(), mass, marginals=marginals)
        converged = partial_transport(cost, mass, marginals=marginals, n_iter=250 if few else 400)
        assert converged.residual.max() < 1e-4
        assert found.plan.dtype == torch.float32
        assert relative_error(found.plan, converged.plan) < 2e-3
        assert_feasible(found.plan, a, b, mass, atol=2e-3)
        assert_feasible(converged.plan, a, b, mass)


@pytest.mark.parametrize("marginals", ["unit", "uniform"])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (12, 12)])
def test_near_assignments_converge_too(size, marginals):
    """Almost all mass of small square problems: an update that jumps past the optimum runs in circles there."""
    cost = cosine_costs(size, dim=8, batch=64, seed=1)
    for mass, reg in [(0.75, REG), (0.99, REG), (0.999, REG), (0.75, 0.02)]:
        assert partial_transport(cost, mass, reg, marginals=marginals, n_iter=600).residual.max() < 3e-2


# The residual


def test_residual_is_small_only_near_the_optimum():
    """At every number of iterations it says how far the plan still is, within a factor of a hundred."""
    cost = cosine_costs((16, 16), dim=16, batch=8)
    for mass in (0.5, 0.9, 0.99):
        converged = partial_transport(cost, mass, n_iter=3000)
        assert converged.residual.max() < 1e-8
        for n_iter in (1, 5, 20, 60, 150):
            found = partial_transport(cost, mass, n_iter=n_iter)
            errors = (found.plan - converged.plan).abs().sum((1, 2)) / mass
            assert (found.residual > errors / 100 - 1e-12).all()
            assert (found.residual < errors * 100 + 1e-12).all()


def test_residual_does_not_vanish_while_the_plan_stalls():
    """A small reg, where Dykstra's plan stays as it is for long although most of its mass is infeasible."""
    cost = cosine_costs((32, 16), batch=4)
    converged = partial_transport(cost, 0.5, 1e-3, n_iter=20_000).cost
    for n_iter in (1, 10, 50, 200):
        found = partial_transport(cost, 0.5, 1e-3, n_iter=n_iter)
        gap = (found.cost - converged).abs() / converged
        assert (found.residual > gap / 100).all()
    assert (partial_transport(cost, 0.5, 1e-3, n_iter=1).residual > 1e-2).all()
    assert partial_transport(cost, solver="exact").residual.eq(0).all()


@pytest.mark.parametrize("scale", [1.0, 1500.0])
@pytest.mark.parametrize("marginals", ["unit", "uniform"])
@pytest.mark.parametrize("mass", [1e-6, 0.1, 0.5, 0.99, 1.0])
def test_hard_problems_stay_finite_and_carry_their_mass(scale, marginals, mass):
    """Reg of 1e-3, and squared distances that nobody normalised: not converged maybe, which the residual tells."""
    cost = cosine_costs((75, 32), dtype=torch.float32) * scale
    reg = 1e-3 if scale == 1 else 0.05
    found = partial_transport(cost, mass, reg, marginals=marginals)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found.plan.sum((1, 2)), torch.full((4,), mass), rtol=1e-4, atol=0)
    exact = partial_transport(cost, mass, marginals=marginals, solver="exact").cost
    assert (found.residual > (found.cost - exact) / exact / 100 - 1e-4).all()
    if mass == 0.99 and marginals == "uniform":
        assert found.residual.max() > 1e-2


# The exact solver


@pytest.mark.parametrize("marginals", ["unit", "uniform"])
@pytest.mark.parametrize("size", [(5, 4), (4, 7), (6, 6), (3, 11)])
def test_exact_solver_finds_the_least_cost(size, marginals):
    """Against scipy's, with costs of any sign and scale, ties and all-zero ones: POT alone loses the mass of those."""
    random, (a, b) = cosine_costs(size, batch=1)[0], capacities(size, marginals)
    zeros = torch.zeros(size, dtype=torch.float64)
    problems = [random, random - 3, -random, 1e5 * random, zeros, random.round(), zeros - 1]
    cost = torch.stack(problems)
    for mass in (0.1, 0.5, 1.0):
        found = partial_transport(cost, mass, marginals=marginals, solver="exact")
        assert_feasible(found.plan, a, b, mass, atol=1e-9)
        expected = [linear_program(x.numpy(), a.numpy(), b.numpy(), min(mass, a.sum(), b.sum())) for x in cost]
        torch.testing.assert_close(found.cost, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)
        assert found.residual.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["entropic", "exact"])
def test_all_mass_at_sizes_whose_parts_do_not_sum_to_one(solver, dtype):
    """The sum of n parts of 1/n is off by a rounding, which POT calls infeasible."""
    for n in range(1, 60):
        found = partial_transport(torch.rand(1, n, n + 1, dtype=dtype), 1.0, marginals="uniform", solver=solver)
        torch.testing.assert_close(found.plan.sum(), torch.ones((), dtype=dtype), rtol=1e-5, atol=0)
