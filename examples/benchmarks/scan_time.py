"""What the recurrence costs: `peft_read.recurrent_scan` next to torch's own RNN, GRU and LSTM, as ratios.

    OMP_NUM_THREADS=1 python examples/benchmarks/scan_time.py

Both run the same cell on the same input, torch's module and this package in turns, in one process and one thread; a
ratio is the median over the rounds of torch's processor time over ours. The second table is ours with what padded
batches bring, over ours without. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_read import recurrent_scan


LENGTHS, WIDTHS = (16, 64, 128, 512, 2048, 8192), (4, 8, 16, 32, 64)
CELLS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def make_cell(kind: str, width: int) -> nn.RNNBase:
    """As an adapter has it: as wide as its input."""
    torch.manual_seed(0)
    return CELLS[kind](width, width, batch_first=True)


def ratio(ours: Callable[[], Tensor], other: Callable[[], Tensor], backward: bool, rounds: int) -> tuple[float, float]:
    """Our milliseconds, and the other's time over ours."""
    times: list[tuple[float, float]] = []
    repeats = 1
    while len(times) < rounds:
        mine, theirs = (seconds(run, backward, repeats) for run in (ours, other))
        if mine * repeats < 0.02 and repeats < 64 and not times:  # too short for the clock
            repeats *= 2
            continue
        times.append((mine, theirs))
    return 1e3 * statistics.median(mine for mine, _ in times), statistics.median(b / a for a, b in times)


def seconds(run: Callable[[], Tensor], backward: bool, repeats: int) -> float:
    """Processor time of one call."""
    start = time.process_time()
    for _ in range(repeats):
        with torch.set_grad_enabled(backward):
            outputs = run()
        if backward:
            outputs.sum().backward()
    return (time.process_time() - start) / repeats


def compare_with_torch(args: argparse.Namespace) -> None:
    """Print a table for each cell."""
    for kind in args.cells:
        for backward in (False, True):
            print(
                f"\n{kind}, {'forward and backward' if backward else 'forward'}: torch's time over ours (ours, ms)\n"
            )
            print(f"| r | {' | '.join(f'L = {length}' for length in args.lengths)} |")
            print("|---|" + "---|" * len(args.lengths))
            for width in args.widths:
                cells = []
                for length in args.lengths:
                    cell = make_cell(kind, width)
                    x = torch.randn(args.batch, length, width, requires_grad=True)
                    torch.testing.assert_close(recurrent_scan(x, cell)[0], cell(x)[0], rtol=1e-4, atol=1e-5)
                    ours, faster = ratio(
                        lambda x=x, cell=cell: recurrent_scan(x, cell)[0],
                        lambda x=x, cell=cell: cell(x)[0],
                        backward,
                        args.rounds,
                    )
                    cells.append(f"{faster:.2f}x ({ours:.3g})")
                print(f"| {width} | {' | '.join(cells)} |", flush=True)


def compare_with_unmasked(args: argparse.Namespace) -> None:
    """Print what masks and initial states cost."""
    print("\nWith a mask or an initial state, over without, forward and backward, r = 32\n")
    print(f"| cell | what | {' | '.join(f'L = {length}' for length in args.lengths)} |")
    print("|---|---|" + "---|" * len(args.lengths))
    for kind in args.cells:
        for what in ("left padding", "holes", "initial state"):
            cells = []
            for length in args.lengths:
                cell, x = make_cell(kind, 32), torch.randn(args.batch, length, 32, requires_grad=True)
                mask = torch.ones(args.batch, length, dtype=torch.bool)
                if what == "left padding":
                    lengths = torch.linspace(length / 4, length, args.batch).long()
                    mask = torch.arange(length) >= length - lengths[:, None]
                elif what == "holes":
                    mask = torch.rand(args.batch, length) > 0.2
                given: dict[str, object] = {"mask": mask}
                if what == "initial state":
                    start = torch.randn(1, args.batch, 32)
                    given = {"state": (start, start) if kind == "lstm" else start}
                _, slower = ratio(
                    lambda x=x, cell=cell: recurrent_scan(x, cell)[0],
                    lambda x=x, cell=cell, given=given: recurrent_scan(x, cell, **given)[0],
                    True,
                    args.rounds,
                )
                cells.append(f"{slower:.2f}")
            print(f"| {kind} | {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS, help="recurrences")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="time steps")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="features and states")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"CPU, 1 thread, torch {torch.__version__}, batch {args.batch}")
    compare_with_torch(args)
    compare_with_unmasked(args)


if __name__ == "__main__":
    main()
