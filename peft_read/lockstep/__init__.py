"""Several towers' forwards, block by block, for composite models of one's own as for `TrimodalModel`.

A composite model describes the running batch (`batch.py`: a `LockstepBatch`, of a `TowerBatch` for each tower) and
calls its towers through `run_towers` (`composite.py`); where time lies in a tower's tokens is its `Layout`
(`layouts.py`). How forwards wait for each other, each in a coroutine, is in `coroutines.py`. Nothing here knows a
model or an adapter.
"""

from .batch import LockstepBatch, TowerBatch
from .composite import run_towers
from .layouts import Layout


__all__ = ["Layout", "LockstepBatch", "TowerBatch", "run_towers"]
