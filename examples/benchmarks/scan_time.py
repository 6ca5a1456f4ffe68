"""What the recurrence costs: `peft_read.recurrent_scan` next to torch's own RNN, GRU and LSTM, as ratios.

    OMP_NUM_THREADS=1 python examples/benchmarks/scan_time.py

Both run the same cell on the same input, torch's module and this package in turns, in one process and one thread; a
ratio is the median over the rounds of torch's time over ours: processor time, on a GPU (`--device cuda`) time until
it has finished. Outputs are compared before anything is timed. A second table is ours with what padded batches bring,
over ours without; a third one is the whole layer of READ, 768 wide, over the bottleneck adapter without a recurrence.
On a GPU, a time is also given as a multiple of what reading the input and writing the output once would take, and a
table more has both sides as CUDA graphs, which no host holds up. Neither side may round to TF32 there: cuDNN does so
unless it's forbidden, and is then off by a thousandth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_read import ReadConfig, recurrent_scan
from peft_read.forward.context import ForwardContext
from peft_read.read.layer import ReadLayer


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
    """Time of one call, after one that warms up."""
    on_gpu = run().is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        with torch.set_grad_enabled(backward):
            outputs = run()
        if backward:
            outputs.sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def bandwidth(device: str) -> float:
    """Bytes that a GPU moves in a second: a copy's, read and written."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    copies = [seconds(lambda: target.copy_(source), False, 10) for _ in range(5)]
    return 2 * source.nbytes / statistics.median(copies)


def compare_with_torch(args: argparse.Namespace) -> None:
    """Print a table for each cell."""
    floor_of = bandwidth(args.device) if args.device == "cuda" else None
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
                    cell = make_cell(kind, width).to(args.device)
                    x = torch.randn(args.batch, length, width, device=args.device, requires_grad=True)
                    torch.testing.assert_close(recurrent_scan(x, cell)[0], cell(x)[0], rtol=1e-4, atol=1e-5)
                    ours, faster = ratio(
                        lambda x=x, cell=cell: recurrent_scan(x, cell)[0],
                        lambda x=x, cell=cell: cell(x)[0],
                        backward,
                        args.rounds,
                    )
                    cells.append(f"{faster:.2f}x ({ours:.3g})")
                    if floor_of is not None:
                        floor = 1e3 * (2 + 2 * backward) * x.nbytes / floor_of
                        cells[-1] += f", {ours / floor:.0f} times the traffic's"
                print(f"| {width} | {' | '.join(cells)} |", flush=True)


def compare_graphs(args: argparse.Namespace) -> None:
    """Print what the kernels alone take, of both sides."""
    print("\nAs CUDA graphs, forward and backward, r = 32: torch's time over ours (ours, ms)\n")
    print(f"| cell | {' | '.join(f'L = {length}' for length in args.lengths)} |")
    print("|---|" + "---|" * len(args.lengths))
    for kind in args.cells:
        cells = []
        for length in args.lengths:
            cell = make_cell(kind, 32).cuda()
            x = torch.randn(args.batch, length, 32, device="cuda", requires_grad=True)
            ours = captured(lambda x=x, cell=cell: recurrent_scan(x, cell)[0], [x, *cell.parameters()])
            theirs = captured(lambda x=x, cell=cell: cell(x)[0], [x, *cell.parameters()])
            mine, faster = ratio(ours, theirs, False, args.rounds)
            cells.append(f"{faster:.1f}x ({mine:.3g})")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def captured(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    """Forward and backward pass as one graph; gives the gradient of the first leaf."""

    def step() -> tuple[Tensor, ...]:
        outputs = run()
        return torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first runs choose and compile kernels, which a graph can't record
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    for given, expected in zip(results, step(), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    def replay() -> Tensor:
        graph.replay()
        return results[0]

    return replay


def compare_layers(args: argparse.Namespace) -> None:
    """Print what the layer costs, over the same without a recurrence."""
    print("\nThe layer, 768 wide, r = 32, over the bottleneck adapter's, forward and backward\n")
    print(f"| cell | {' | '.join(f'L = {length}' for length in args.lengths)} |")
    print("|---|" + "---|" * len(args.lengths))
    for kind in args.cells:
        cells = []
        for length in args.lengths:
            x = torch.randn(args.batch, length, 768, device=args.device, requires_grad=True)
            plain, recurrent = (make_layer(name).to(args.device) for name in ("none", kind))
            _, slower = ratio(
                lambda x=x, layer=plain: layer(x), lambda x=x, layer=recurrent: layer(x), True, args.rounds
            )
            cells.append(f"{slower:.2f}")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def make_layer(cell: str) -> nn.Module:
    """READ around a module that changes nothing."""
    torch.manual_seed(0)
    layer = ReadLayer(nn.Identity(), 768, ForwardContext(causal=True), "benchmark")
    layer.update_layer("default", 32, ReadConfig(r=32, cell=cell))
    layer.set_adapter("default")
    return layer.requires_grad_()


def compare_with_unmasked(args: argparse.Namespace) -> None:
    """Print what masks and initial states cost."""
    print("\nWith a mask or an initial state, over without, forward and backward, r = 32\n")
    print(f"| cell | what | {' | '.join(f'L = {length}' for length in args.lengths)} |")
    print("|---|---|" + "---|" * len(args.lengths))
    for kind in args.cells:
        for what in ("left padding", "holes", "initial state"):
            cells = []
            for length in args.lengths:
                cell, x = make_cell(kind, 32).to(args.device), torch.randn(args.batch, length, 32, device=args.device)
                x.requires_grad_()
                mask = torch.ones(args.batch, length, dtype=torch.bool)
                if what == "left padding":
                    lengths = torch.linspace(length / 4, length, args.batch).long()
                    mask = torch.arange(length) >= length - lengths[:, None]
                elif what == "holes":
                    mask = torch.rand(args.batch, length) > 0.2
                given: dict[str, object] = {"mask": mask.to(args.device)}
                if what == "initial state":
                    start = torch.randn(1, args.batch, 32, device=args.device)
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
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    hardware = "CPU, 1 thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{hardware}, torch {torch.__version__}, batch {args.batch}")
    compare_with_torch(args)
    if args.device == "cuda":
        compare_graphs(args)
    compare_with_unmasked(args)
    compare_layers(args)


if __name__ == "__main__":
    main()
