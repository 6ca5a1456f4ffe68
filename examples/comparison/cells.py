"""The runs of a comparison: which there are, in which order, what each gives, and where results are kept."""

from __future__ import annotations

import gc
import json
import os
import resource
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from common.training import train
from torch import nn
from transformers import TrainerCallback, set_seed

from .methods import METHODS, adapt


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
HEAD_RATE = 1e-2  # of what is trained beside every method
GRID_VIDEOS, GRID_STEPS, GRID_SEED = 100, 200, 0
LOOKS = 5  # at the validation score while it trains, for the learning curve


class Task(Protocol):
    """What is learnt."""

    panel: str
    metric: str
    second_metric: str
    heads: list[str]
    batch_size: int

    def make(self, seed: int) -> None:
        """Make what belongs to a seed, unless it exists."""

    def examples(self, seed: int) -> dict[str, Any]:
        """By split, the examples of a seed."""

    def base(self, seed: int) -> nn.Module:
        """The base of a seed, to be frozen."""

    def collator(self, noisy: Any = ()) -> Any:
        """Of batches; with noise relative to the features of `noisy`, if there are some."""

    def score(self, model: nn.Module, examples: Any) -> dict[str, float]:
        """The metrics, in per cent."""

    def oracle(self, seed: int) -> float:
        """The `metric` of who knows all but the order in time."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        panel: the task.
        method: a key of `METHODS`.
        videos: that are trained on.
        steps: of training.
        seed: of videos, frame encoder, base, initialisation and order.
        rate: peak learning rate of the method.
    """

    panel: str
    method: str
    videos: int
    steps: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.panel}_{self.method}_{self.videos}_{self.steps}_{self.seed}_{self.rate:g}.json"


class Store:
    """Results on disk, one file a cell: what is there isn't run again.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, cell: Cell) -> bool:
        return (self.folder / cell.name).is_file()

    def read(self, cell: Cell) -> dict[str, Any]:
        """A cell's result."""
        found: dict[str, Any] = json.loads((self.folder / cell.name).read_text(encoding="utf-8"))
        return found

    def write(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep a cell's result, whole or not at all."""
        draft = self.folder / f".{cell.name}.{os.getpid()}"
        draft.write_text(json.dumps(asdict(cell) | result), encoding="utf-8")
        draft.rename(self.folder / cell.name)

    def all(self) -> list[dict[str, Any]]:
        """All results, in a fixed order."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]


def grid(store: Store, panel: str, methods: Sequence[str], metric: str) -> list[Cell]:
    """The runs still missing to choose each method's learning rate.

    One grid for all methods, searched from its middle: a rate is chosen when the rates beside it in the grid have been
    tried and are no better on validation videos.
    """
    missing = []
    for method in methods:
        scores = _grid_scores(store, panel, method, metric)
        middle = RATES.index(max(scores, key=scores.__getitem__) if scores else RATES[len(RATES) // 2])
        around = RATES[max(middle - 1, 0) : middle + 2]
        missing += [_grid_cell(panel, method, rate) for rate in around if rate not in scores]
    return missing


def chosen_rates(store: Store, panel: str, methods: Sequence[str], metric: str) -> dict[str, float]:
    """The rate of each method with the best validation score in the grid; none where runs are missing for it."""
    rates = {}
    for method in methods:
        if not grid(store, panel, [method], metric):
            scores = _grid_scores(store, panel, method, metric)
            rates[method] = max(scores, key=scores.__getitem__)
    return rates


def _grid_cell(panel: str, method: str, rate: float) -> Cell:
    return Cell(panel, method, GRID_VIDEOS, GRID_STEPS, GRID_SEED, rate)


def _grid_scores(store: Store, panel: str, method: str, metric: str) -> dict[float, float]:
    """Validation scores of the rates that have been tried."""
    cells = [_grid_cell(panel, method, rate) for rate in RATES]
    return {cell.rate: store.read(cell)["validation"][metric] for cell in cells if cell in store}


def finals(
    panel: str, rates: dict[str, float], settings: Iterable[tuple[int, int]], seeds: Sequence[int]
) -> Iterator[Cell]:
    """The runs of the tables, the first setting first, each seed for all methods."""
    for videos, steps in settings:
        for seed in seeds:
            for method, rate in rates.items():
                yield Cell(panel, method, videos, steps, seed, rate)


class LearningCurve(TrainerCallback):
    """Looks at the validation score at equal intervals, and takes the time that this takes.

    Args:
        task: whose score it is.
        model: that is trained.
        examples: to validate on.
        cell: of the run.
    """

    def __init__(self, task: Task, model: nn.Module, examples: Any, cell: Cell) -> None:
        self.task, self.model, self.examples, self.cell = task, model, examples, cell
        self.scores: list[tuple[int, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if it is time."""
        every = max(self.cell.steps // LOOKS, 1)
        if state.global_step % every or state.global_step == self.cell.steps:
            return
        start = time.process_time()
        with torch.random.fork_rng(devices=[]):
            score = self.task.score(self.model, self.examples)[self.task.metric]
        self.model.train()
        self.scores.append((state.global_step, round(score, 2)))
        self.seconds += time.process_time() - start


def run(task: Task, cell: Cell, output: Path) -> dict[str, Any]:
    """Train and score one cell.

    Returns:
        `validation` and `test` scores, `weights` that are trained, `cpu_seconds_a_step`, and learning curves by step:
        training `losses`, and the `validation_curve` of 50 videos.
    """
    model, examples, weights = _prepare(task, cell)
    few, validation = examples["train"][: cell.videos], examples["validation"]
    curve = LearningCurve(task, model, validation[:50], cell)
    start = time.process_time()
    trainer = _train(task, cell, model, few, output, callbacks=[curve])
    seconds = time.process_time() - start - curve.seconds
    losses = [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "validation": _rounded(task.score(model, validation)),
        "test": _rounded(task.score(model, examples["test"])),
        "weights": weights,
        "cpu_seconds_a_step": round(seconds / cell.steps, 4),
        "losses": losses,
        "validation_curve": curve.scores,
    }


def peak_memory(task: Task, cell: Cell, output: Path) -> float:
    """The most memory, in MiB, of this process after three steps of a cell; for a process of its own."""
    model, examples, _ = _prepare(task, cell)
    short = Cell(**(asdict(cell) | {"steps": 3}))
    _train(task, short, model, examples["train"][: cell.videos], output, callbacks=[])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def quiet() -> None:
    """Settings of a process that runs cells: one thread, few words, no search for garbage among what was imported."""
    torch.set_num_threads(1)
    gc.freeze()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # PEFT's prefix tuning gives transformers 5.24 its cache by the old name.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)


def _prepare(task: Task, cell: Cell) -> tuple[nn.Module, dict[str, Any], int]:
    """The adapted model, the examples, and the number of trained weights."""
    if cell.method not in METHODS:
        raise ValueError(f"Unknown method {cell.method!r}; there are {', '.join(METHODS)}.")
    model = task.base(cell.seed)
    set_seed(cell.seed)
    weights = adapt(model, cell.method, task.heads)
    return model, task.examples(cell.seed), weights


def _train(
    task: Task, cell: Cell, model: nn.Module, few: Any, output: Path, callbacks: Sequence[TrainerCallback]
) -> transformers.Trainer:
    alone = cell.method == "head"
    return train(
        model,
        few,
        task.collator(few),
        steps=cell.steps,
        learning_rate=cell.rate,
        learning_rates={} if alone else dict.fromkeys(task.heads, HEAD_RATE),
        seed=cell.seed,
        batch_size=task.batch_size,
        output_dir=str(output),
        description=cell.name,
        log_steps=max(cell.steps // (2 * LOOKS), 1),
        callbacks=callbacks,
        pvla=METHODS[cell.method].pvla,
    )


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in scores.items()}
