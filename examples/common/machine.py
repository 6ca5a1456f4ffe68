"""What numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "peft", "scikit-learn", "numpy")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, accelerator and the versions of what computes."""
    found = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _processor(), "cores": os.cpu_count(), "accelerator": device, "versions": found}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
