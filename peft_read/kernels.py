"""Whether this package's Triton kernels run, or what torch offers in their place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


SWITCH = "PEFT_READ_SCAN"  # environment variable that forces what else is chosen by device


def triton_runs(x: Tensor, lacks: str | None, passes_trial: Callable[[], bool]) -> bool:
    """Whether a Triton kernel is to work on `x`: on a GPU, if it passes a trial there; or as the switch forces it.

    Args:
        x: what the kernel is to work on.
        lacks: what else the kernel needs, and what is there instead; None if nothing is lacking.
        passes_trial: says whether the kernel works on the device.

    Raises:
        ValueError: if the switch has another value than `auto`, `torch` and `triton`, or forces the kernel upon what
            it can't run.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"The environment variable {SWITCH} must be auto, torch or triton, got {choice!r}.")
    if choice == "torch" or (choice == "auto" and not x.is_cuda):
        return False
    if not _has_triton():
        lacks = "the package triton, which isn't installed"
    elif not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        lacks = f"a GPU, and this is on {x.device}"
    if choice == "triton":
        if lacks is not None:
            raise ValueError(f"{SWITCH}=triton needs {lacks}. Unset it to let the device decide.")
        return True
    return lacks is None and passes_trial()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def passes_trial(device: torch.device, compare: Callable[[], Sequence[tuple[Tensor, Tensor]]]) -> bool:
    """Whether a kernel gives on a GPU what torch does; a warning says why not.

    Triton needs a compiler beside it, and there are more GPUs than can be tested on.

    Args:
        device: a GPU.
        compare: runs the kernel and what it stands for, in float64; gives pairs of results of the two.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    problem = None
    try:
        for ours, exact in compare():
            if not torch.allclose(ours.double(), exact, rtol=0, atol=1e-2 * float(exact.abs().max())):
                problem = "they give other results than torch's"
    except Exception as error:  # whatever a compiler, driver or GPU comes up with
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        name = torch.cuda.get_device_name(device)
        warnings.warn(
            f"READ's Triton kernels don't run on {name} ({problem}). torch's own kernels run instead, slower ones. "
            f"Set {SWITCH}=torch to choose them without this warning.",
            stacklevel=2,
        )
    return problem is None
