"""The definition of partial transport, beside the fast solver and another library's."""

import pytest
import torch
from transport_oracles import capacities, cosine_costs, linear_program, pot_entropic

from peft_read import partial_transport
from peft_read.pvla.naive import naive_partial_transport


CASES = [((8, 6), "unit", 0.5), ((8, 6), "uniform", 0.5), ((12, 5), "unit", 0.25), ((5, 12), "uniform", 0.9)]


@pytest.mark.parametrize(("size", "marginals", "mass"), CASES)
def test_the_definition_is_what_all_others_find(size, marginals, mass):
    """The plan of Dykstra's iterations, of the fast solver and of POT; its sides within what they may carry."""
    cost, (rows, columns) = cosine_costs(size, batch=1), capacities(size, marginals)
    plan = naive_partial_transport(cost[0], rows, columns, mass, reg=0.2, n_iter=3000)
    fast = partial_transport(cost, mass, 0.2, marginals=marginals, n_iter=500).plan[0]
    assert (plan - fast).abs().sum() / mass < 1e-6
    other = pot_entropic(cost[0], rows, columns, mass, 0.2)
    assert (plan - other).abs().sum() / mass < 1e-6
    assert plan.sum().item() == pytest.approx(mass)
    assert (plan.sum(1) <= rows + 1e-8).all()
    assert (plan.sum(0) <= columns + 1e-8).all()


def test_the_definition_tends_to_the_linear_program():
    """With ever less entropy, the cost comes down to the least one there is."""
    cost, (rows, columns) = cosine_costs((8, 6), batch=1)[0], capacities((8, 6), "unit")
    least = linear_program(cost.numpy(), rows.numpy(), columns.numpy(), 0.5)
    gaps = [
        float((naive_partial_transport(cost, rows, columns, 0.5, reg, n_iter=4000) * cost).sum()) / least - 1
        for reg in (0.1, 0.03, 0.01)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 <= gaps[-1] < 0.02


def test_words_carry_what_their_weights_allow():
    """Other capacities than a side's equal shares, one of them 0."""
    cost, rows = cosine_costs((8, 6), batch=1), torch.full((8,), 1 / 6, dtype=torch.float64)
    columns = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25, 2.0], dtype=torch.float64) / 6
    some = columns > 0
    plan = naive_partial_transport(cost[0][:, some], rows, columns[some], 0.4, reg=0.2, n_iter=3000)
    fast = partial_transport(cost, 0.4 / columns.sum().item(), 0.2, marginals=(rows[None], columns[None]), n_iter=500)
    assert (plan - fast.plan[0][:, some]).abs().sum() < 1e-6
    assert fast.plan[0][:, ~some].eq(0).all()
