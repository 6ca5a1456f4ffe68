"""In which precision things are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on `device` keep the dtypes of their arguments."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
