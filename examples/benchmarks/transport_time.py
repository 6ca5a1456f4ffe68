"""What partial transport costs: `peft_read.pvla`'s solver next to what POT offers, as ratios.

    OMP_NUM_THREADS=1 python examples/benchmarks/transport_time.py

Costs are cosine distances of random features, half of the shorter side's mass moves, reg is 0.05, and whatever
iterates does so 50 times. Compared are POT's entropic solver of the same problem and its linear program, both sample
by sample, and its batched solver of balanced problems with a dummy row and column that take the rest of the mass
(whose entropy covers the rest as well: another plan). Methods take turns in one process and one thread; a ratio is the
median over the rounds of a method's processor time over ours. Plans are compared before anything is reported. With
`--device cuda` costs lie on a GPU, and a time is that until it has finished; the linear program still runs on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import ot
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_read.pvla.transport import partial_transport


SIZES = [(8, 8), (32, 16), (75, 32), (256, 64)]
OURS = "ours"
MASS, REG, ITERATIONS = 0.5, 0.05, 50


def make_costs(size: tuple[int, int], batch: int, device: str) -> Tensor:
    """`(batch, frames, words)` cosine distances of random features."""
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, points, 64), dim=-1) for points in size)
    return (1 - x @ y.mT).to(device)


def capacities(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Of a sample's frames and words, those of `marginals="unit"`."""
    frames, words = (cost.new_full((n,), 1 / min(cost.shape[1:])) for n in cost.shape[1:])
    return frames, words


def ours(cost: Tensor, n_iter: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """This package's: plans and costs."""
    found = partial_transport(cost, MASS, REG, n_iter=n_iter)
    return found.plan, found.cost


def entropic_loop(cost: Tensor, n_iter: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """POT's entropic partial solver, differentiated through its iterations."""
    a, b = capacities(cost.detach())
    solve, mass = ot.partial.entropic_partial_wasserstein, a.new_tensor(MASS)
    plans = torch.stack([solve(a, b, sample, REG, m=mass, numItermax=n_iter) for sample in cost])
    return plans, (plans * cost).sum((1, 2))


def batched_with_dummy(cost: Tensor, n_iter: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """POT's batched balanced solver: what isn't moved goes to a dummy point, at no cost but between the dummies."""
    a, b = (
        torch.cat([side, (other.sum() - MASS)[None]])
        for side, other in itertools.permutations(capacities(cost.detach()))
    )
    padded = F.pad(cost, (0, 1, 0, 1))
    padded[:, -1, -1] = 100 * REG  # forbids mass between the dummies, at this reg
    a, b = a.expand(len(cost), -1), b.expand(len(cost), -1)
    found = ot.batch.solve_batch(padded, REG, a, b, max_iter=n_iter, tol=0, method="log_sinkhorn", grad="envelope")
    plans = found.plan[:, :-1, :-1]
    return plans, (plans * cost).sum((1, 2))


def program_loop(cost: Tensor) -> tuple[Tensor, Tensor]:
    """POT's linear program, whose plan is the gradient."""
    a, b = (side.double().cpu().numpy() for side in capacities(cost.detach()))
    samples = cost.detach().double().cpu().numpy()
    plans = [torch.from_numpy(ot.partial.partial_wasserstein(a, b, sample, m=MASS)) for sample in samples]
    stacked = torch.stack(plans).to(cost)
    return stacked, (stacked * cost).sum((1, 2))


METHODS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    OURS: ours,
    "POT, entropic, loop": entropic_loop,
    "POT, batched + dummy": batched_with_dummy,
    "POT, linear program, loop": program_loop,
}


def verify(size: tuple[int, int], device: str) -> str:
    """Compare what the methods find; raises `RuntimeError` where one solves another problem than it should."""
    cost = make_costs(size, 2, device)
    plan, value = ours(cost)
    converged, _ = ours(cost, 1000)
    expected, _ = entropic_loop(cost, 1000)
    dummy, _ = batched_with_dummy(cost, 1000)
    _, least = program_loop(cost)

    def error(found: Tensor, reference: Tensor) -> float:
        return ((found - reference).abs().sum((1, 2)) / MASS).max().item()

    errors = {
        "ours after 50 iterations from converged": (error(plan, converged), 2e-3),
        "ours, converged, from POT's entropic": (error(converged, expected), 1e-3),
        "mass of the dummy's": ((dummy.sum((1, 2)) - MASS).abs().max().item() / MASS, 1e-2),
    }
    for name, (found, allowed) in errors.items():
        if found > allowed:
            raise RuntimeError(f"{size}: {name}: {found:.1e}, which is more than {allowed:.0e}; nothing to report.")
    gap = (value / least - 1).max().item()
    if gap < -1e-5:
        raise RuntimeError(f"{size}: cost {-gap:.1%} below the linear program's least one; nothing to report.")
    shown = ", ".join(f"{name} {found:.0e}" for name, (found, _) in errors.items())
    return f"{size}: {shown}; dummy's plan from ours {error(dummy, converged):.2f}; cost above the least {gap:.1%}"


def seconds(method: Callable[[Tensor], tuple[Tensor, Tensor]], cost: Tensor, backward: bool, repeats: int) -> float:
    """Processor time of one call, on a GPU the time until it has finished."""
    cost = cost.clone().requires_grad_(backward)
    start = now(cost.is_cuda)
    for _ in range(repeats):
        _, value = method(cost)
        if backward:
            value.sum().backward()
    return (now(cost.is_cuda) - start) / repeats


def now(on_gpu: bool) -> float:
    """The processor time so far, or the time at which a GPU has done what it was given."""
    if not on_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Verify, measure and print a table for forward, and one for forward and backward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16, 64], help="samples in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every method that are timed")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the costs are")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what to time")
    args = parser.parse_args()
    methods = {name: method for name, method in METHODS.items() if name == OURS or name in args.methods}
    torch.set_num_threads(1)
    hardware = "CPU, 1 thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{hardware}, torch {torch.__version__}, POT {ot.__version__}\n")
    for size in SIZES:
        print(verify(size, args.device))
    for backward in (False, True):
        print(f"\n{'Forward and backward' if backward else 'Forward'}\n")
        print(f"| frames x words, batch | ours, ms | {' | '.join(list(methods)[1:])} |\n|---|{'---|' * len(methods)}")
        for size in SIZES:
            for batch in args.batch:
                cost, rounds = make_costs(size, batch, args.device), []
                for _ in range(args.rounds + 1):
                    # The slowest takes hundreds of times as long, so the others are timed over several calls.
                    turn = {n: seconds(f, cost, backward, 1 if f is entropic_loop else 5) for n, f in methods.items()}
                    rounds.append(turn)
                rounds = rounds[1:]  # the first warms up
                ratios = [statistics.median(turn[name] / turn[OURS] for turn in rounds) for name in methods]
                own = 1000 * statistics.median(turn[OURS] for turn in rounds)
                shown = " | ".join(f"{ratio:.3g}x" for ratio in ratios[1:])
                print(f"| {size[0]} x {size[1]}, {batch} | {own:.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
