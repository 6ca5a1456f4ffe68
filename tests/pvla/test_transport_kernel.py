"""The Triton kernel of partial transport against torch's path: on a GPU where there is one, else interpreted."""

import itertools

import pytest
import torch
from fresh import run_code
from transport_oracles import capacities, cosine_costs, pot_entropic
from triton_device import DEVICE, MARKS

from peft_read.kernels import SWITCH
from peft_read.pvla import transport
from peft_read.pvla.transport import partial_transport


# Nothing flows from or to a point that is padding: its factor is one over zero, and then its limit.
pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _by_kernel(monkeypatch):
    monkeypatch.setenv(SWITCH, "triton")


def by_torch(cost, *args, **kwargs):
    """What torch's path finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "torch")
        return partial_transport(cost, *args, **kwargs)


def to_device(arguments):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def check(cost, *args, **kwargs):
    """The kernel gives what torch gives in float64, as closely as torch itself in float32."""
    exact = by_torch(cost.double(), *args, **kwargs)
    usual = by_torch(cost.float(), *args, **kwargs)
    ours = partial_transport(cost.float().to(DEVICE), *args, **to_device(kwargs))
    for result, other, expected in zip(ours, usual, exact, strict=True):
        error, allowed = ((part.cpu().double() - expected).abs().max() for part in (result, other))
        assert error <= 10 * allowed + 2e-6 * expected.abs().max() + 1e-6


# The interpreter takes seconds for each: there every size, mass and kind of marginals comes up, not each with each.
SOME = [
    ((8, 8), 0.1, "unit"),
    ((5, 21), 0.5, "uniform"),
    ((33, 16), 0.9, "unit"),
    ((8, 8), 0.99, "uniform"),
    ((5, 21), 1.0, "unit"),
    ((33, 16), 1.0, "uniform"),
]
ALL = list(itertools.product([(8, 8), (5, 21), (33, 16)], [0.1, 0.5, 0.9, 0.99, 1.0], ["unit", "uniform"]))


@pytest.mark.parametrize(("size", "mass", "marginals"), SOME if DEVICE == "cpu" else ALL)
def test_equals_torch(size, mass, marginals):
    """Plan, cost and residual, after as many iterations as are the default."""
    check(cosine_costs(size, batch=2), mass, marginals=marginals)


@pytest.mark.parametrize("n_iter", [1, 6, 12, 25, 26])
def test_equals_torch_after_any_number_of_iterations(n_iter):
    """Around those in which something else happens."""
    check(cosine_costs((9, 7), batch=1), 0.8, n_iter=n_iter)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes minutes")
@pytest.mark.parametrize("size", [(256, 64), (250, 61), (512, 64), (200, 128)])
def test_equals_torch_at_full_size(size):
    """All warps of a program, up to the largest problem."""
    for mass in (0.1, 0.5, 1.0):
        check(cosine_costs(size, batch=64), mass)


@pytest.mark.parametrize(("mass", "marginals"), [(0.3, "uniform"), (1.0, "unit")])
def test_converged_plan_is_that_of_pot(mass, marginals):
    """Of its entropic solver."""
    cost, (a, b) = cosine_costs((8, 8), batch=1), capacities((8, 8), marginals)
    found = partial_transport(cost.float().to(DEVICE), mass, 0.2, marginals=marginals, n_iter=150)
    expected = pot_entropic(cost[0], a, b, mass, 0.2)
    torch.testing.assert_close(found.plan[0].cpu().double(), expected, rtol=1e-4, atol=1e-6)
    assert found.residual < 1e-5


@pytest.mark.parametrize(("mass", "scale"), [(1e-6, 1.0), (0.5, 1500.0), (0.99, 1.0), (1.0, 1500.0)])
def test_hard_problems_stay_finite_and_carry_their_mass(mass, scale):
    """Reg of 1e-3, and squared distances that nobody normalised."""
    cost = (cosine_costs((20, 12), batch=2) * scale).float().to(DEVICE)
    found = partial_transport(cost, mass, 1e-3 if scale == 1 else 0.05)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found.plan.sum((1, 2)).cpu(), torch.full((2,), mass), rtol=1e-4, atol=0)
    exact = by_torch(cost, mass, solver="exact").cost
    assert (found.residual > (found.cost - exact) / exact / 100 - 1e-4).all()


@pytest.mark.parametrize(("garbage", "marginals"), [(-1e9, "given"), (torch.inf, "unit"), (torch.nan, "given")])
def test_padding_is_ignored(marginals, garbage):
    """Whatever lies in it; a sample without any pair has nothing."""
    generator = torch.Generator().manual_seed(0)
    frame_mask = torch.arange(10) < torch.tensor([10, 3, 10, 0])[:, None]
    word_mask = torch.arange(6) < torch.tensor([6, 6, 2, 4])[:, None]
    pairs = frame_mask[:, :, None] & word_mask[:, None, :]
    cost = cosine_costs((10, 6)).masked_fill(~pairs, garbage)
    given = tuple(torch.rand(4, n, generator=generator) + 0.1 for n in (10, 6))
    masks = {"frame_mask": frame_mask, "word_mask": word_mask}
    exact = by_torch(cost, 0.6, marginals=given if marginals == "given" else marginals, n_iter=26, **masks)
    given = tuple(part.to(DEVICE) for part in given)
    leaf = cost.float().to(DEVICE).requires_grad_()
    marginals = given if marginals == "given" else marginals
    found = partial_transport(leaf, 0.6, marginals=marginals, n_iter=26, **to_device(masks))
    (gradient,) = torch.autograd.grad(found.cost.sum(), leaf)
    assert torch.equal(gradient, found.plan)
    assert found.plan.cpu()[~pairs].eq(0).all()
    torch.testing.assert_close([x.cpu().double() for x in found], list(exact), rtol=1e-4, atol=2e-6)


def test_a_bad_number_shows_in_its_sample_only():
    """The others don't differ in a bit."""
    cost = cosine_costs((8, 6), dtype=torch.float32).to(DEVICE)
    clean = partial_transport(cost, n_iter=12)
    cost[0, 3, 2], cost[1, 0, 5], cost[2, 7, 0] = torch.nan, torch.inf, -torch.inf
    found = partial_transport(cost, n_iter=12)
    assert not found.cost[:3].isfinite().any()
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[3], y[3])


def test_any_layout_and_a_mass_for_each_sample():
    """Costs that aren't contiguous."""
    check(cosine_costs((7, 12)).mT, torch.tensor([0.1, 0.4, 0.9, 1.0]), n_iter=12)


def test_the_switch(monkeypatch):
    """It forces either path; what can't be forced is said."""
    cost, called = cosine_costs((4, 3), dtype=torch.float32).to(DEVICE), []
    original = transport._solve_by_kernel
    monkeypatch.setattr(transport, "_solve_by_kernel", lambda *args: called.append(1) or original(*args))
    partial_transport(cost, n_iter=1)
    assert called == [1]
    with pytest.raises(ValueError, match=r"costs in float32, and these are in torch\.float64"):
        partial_transport(cost.double())
    with pytest.raises(ValueError, match="at most 32768 pairs of frames and words, and here are 65536"):
        partial_transport(torch.rand(1, 256, 129, device=DEVICE))
    monkeypatch.setenv(SWITCH, "torch")
    partial_transport(cost)
    monkeypatch.delenv(SWITCH)
    partial_transport(cost.cpu())
    partial_transport(cost.double())
    assert called == [1]


def test_a_gpu_on_which_it_fails_is_told(monkeypatch):
    """torch runs there, after one warning that says why."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert transport._passes_trial.__wrapped__(torch.device(DEVICE))
    by_kernel = transport._solve_by_kernel
    monkeypatch.setattr(transport, "_solve_by_kernel", lambda *args: [1.1 * part for part in by_kernel(*args)])
    with pytest.warns(UserWarning, match="don't run on a GPU .they give other results"):
        assert not transport._passes_trial.__wrapped__(torch.device(DEVICE))


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

problems = [(80, 8, 8), (90, 75, 31), (100, 512, 64)]

class NoGPU:
    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", problems[self.device][0], 32)

driver.set_active(NoGPU())
from peft_read.pvla import transport_kernel

binaries, run = [], transport_kernel._solve.run
transport_kernel._solve.run = lambda *args, warmup, **kwargs: binaries.append(
    run(*args, warmup=True, **kwargs).asm["cubin"]
)
for driver.active.device, (_, frames, words) in enumerate(problems):
    masks = torch.ones(2, frames, dtype=torch.bool), torch.ones(2, words, dtype=torch.bool)
    a, b = torch.ones(2, frames), torch.ones(2, words)
    transport_kernel.solve(torch.ones(2, frames, words), a, b, torch.ones(2), masks, 0.05, 50)
assert len(binaries) == 3
assert min(map(len, binaries)) > 1000
"""


def test_it_compiles_for_gpus(tmp_path):
    """To machine code, which takes no GPU: the interpreter accepts more than the compiler."""
    run_code(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
