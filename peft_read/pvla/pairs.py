"""Videos with sentences but without labels, of which every step of training aligns a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class PairBatches:
    """A batch of pairs for each step: the same for the same step, whenever training starts or resumes.

    Each process gets its part of a step's batch. All pairs are seen once, in random order, before one comes again.

    Args:
        dataset: the pairs, by index.
        collate: makes a batch of a list of them.
        batch_size: of one process.
        seed: of the order.
        rank: of this process.
        processes: how many there are.
        workers: processes that load, as of `DataLoader`; 0: none.

    Raises:
        ValueError: if the data set has no length, or fewer pairs than a batch of all processes; if a batch has none.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(
                f"pairs_dataset is a {type(dataset).__name__}, which has no length or no items by index. Give one "
                "that has both: a resumed run takes the pairs up where it left them."
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number of pairs, at least 1.")
        if len(dataset) < batch_size * processes:
            raise ValueError(
                f"pairs_dataset has {len(dataset)} pairs, fewer than one batch of {batch_size} on each of {processes} "
                "processes: lower pvla_pairs_batch_size."
            )
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.workers = workers
        self._next = -1
        self._batches: Iterator[Any] = iter(())

    def at(self, step: int) -> Any:
        """The batch of a step, counted from 0."""
        if step != self._next:
            # A generator of its own: a loader draws its workers' seed from torch's, which a resumed run has set.
            loader = DataLoader(
                self.dataset,
                batch_sampler=map(self.indices, count(step)),
                collate_fn=self.collate,
                num_workers=self.workers,
                generator=torch.Generator().manual_seed(self.seed),
            )
            self._batches = iter(loader)
        self._next = step + 1
        return next(self._batches)

    def indices(self, step: int) -> list[int]:
        """Which pairs are in this process's part of a step's batch."""
        size = len(self.dataset)
        first = (step * self.processes + self.rank) * self.batch_size
        orders = {
            epoch: torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            for epoch in {first // size, (first + self.batch_size - 1) // size}
        }
        return [orders[place // size][place % size] for place in range(first, first + self.batch_size)]
