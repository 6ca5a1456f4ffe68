"""What a Trainer has measured since it last logged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


class MetricBuffer:
    """Values by mode, `"train"` or `"eval"`: appended as they come, averaged when they are logged, then cleared."""

    def __init__(self) -> None:
        self._values: dict[str, defaultdict[str, list[Tensor]]] = {m: defaultdict(list) for m in ("train", "eval")}

    def append(self, mode: str, values: Mapping[str, Tensor], *, to_last: bool = False) -> None:
        """Add a value of each, or rows of values; `to_last` adds a number to what came last, as of the same step."""
        for name, value in values.items():
            entries = self._values[mode][name]
            if to_last and entries:
                entries[-1] = entries[-1] + value.detach().float()
            else:
                entries.append(value.detach().float())

    def take(self, mode: str) -> dict[str, Tensor]:
        """The mean of each, and forget them."""
        means = {n: torch.cat([e.flatten() for e in entries]).mean() for n, entries in self._values[mode].items()}
        self._values[mode].clear()
        return means
