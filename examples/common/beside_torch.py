"""torchvision beside a torch that it wasn't built for."""

from __future__ import annotations

import importlib.util
import sys

import torch


# What torchvision declares in Python and defines in its compiled part; no processor of transformers uses them.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []  # what it declares goes with it


def import_torchvision() -> bool:
    """Import torchvision if it is installed, also where its compiled part doesn't load.

    PyPI's torchvision is built for CUDA. Beside a torch for CPUs its compiled operators are missing and the import
    fails, though transformers' processors, which use its transforms alone, would work.

    Returns:
        Whether it is there.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in OPERATORS:
            _library[0].define(operator)
        import torchvision  # noqa: F401
    return True
