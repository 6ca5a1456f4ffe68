"""Whether somebody looks on while a forward runs, to compile, export or record it."""

from __future__ import annotations

import torch
from torch.jit import is_tracing as torch_jit_traces  # type: ignore[attr-defined]


def is_tracing() -> bool:
    """Whether a compiler, an exporter or `torch.jit.trace` looks on: then no decision may depend on values."""
    return torch.compiler.is_compiling() or torch_jit_traces()
