"""Several processes: what is done once for all of them, and how to leave them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env


T = TypeVar("T")
# What torchrun and Accelerate tell the processes that they start.
_LAUNCHER = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_")
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# The others wait while one decodes the videos.
_PATIENCE = timedelta(hours=12)


def join_processes() -> PartialState:
    """This process among those that torchrun or Accelerate has started, if any."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)


def leave_processes() -> None:
    """The end of `join_processes`, once all that the processes share is gone: freed later, it would wait for ever."""
    join_processes().destroy_process_group()


def from_main_process(processes: PartialState, make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in all of them."""
    made = [make() if processes.is_main_process else None]
    broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def once_a_machine(processes: PartialState, make: Callable[[], None]) -> None:
    """Run what makes files unless they exist, while the others wait; machines that share a disk make them once."""
    for turn in (processes.is_main_process, processes.is_local_main_process):
        if turn:
            make()
        processes.wait_for_everyone()


def run_alone(script: str, *arguments: str, capture: bool = False) -> str:
    """Run a script in a new process that isn't one of several, and return what it printed if that is captured."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER)
    }
    # One device: the Trainer would take all of them in one process.
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE if capture else None, text=True)
    return done.stdout or ""
