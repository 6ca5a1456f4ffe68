"""New processes, forked from one that has imported what they need: by themselves each takes four seconds for that."""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


multiprocessing.set_forkserver_preload(
    [
        "common",  # torchvision, where it is, as in `conftest.py`
        "torch.distributed.fsdp",
        "transformers.trainer",
        "transformers.models.ast.modeling_ast",
        "transformers.models.bert.modeling_bert",
        "transformers.models.vit.modeling_vit",
        "peft_read",
    ]
)


@functools.cache
def server():
    """What forks them; Python 3.11's looks for modules where it was told to when it started, so by PYTHONPATH.

    Triton compiles there what it only interprets here.
    """
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        os.environ.pop("TRITON_INTERPRET", None)
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def run_ranks(target, *arguments, processes=2):
    """Call `target(rank, *arguments)` in each of several new processes; what one of them raises is raised here."""
    server()
    torch.multiprocessing.start_processes(target, arguments, nprocs=processes, start_method="forkserver")


def run_code(code, *arguments, **environment):
    """Run a script's code in a new process, with its arguments in `sys.argv`."""
    run_ranks(_run, code, list(map(str, arguments)), environment, processes=1)


def _run(rank, code, arguments, environment):
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    torch.set_num_threads(1)
    exec(compile(code, "<a new process>", "exec"), {"__name__": "__main__"})


def run_script(command, *, env, check, stdout, text):
    """What `subprocess.run` does with the command of a script of Python, in a new process that is forked."""
    assert check, "a script's failure is raised"
    assert text
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "printed")
        printed.touch()
        try:
            run_ranks(_run_script, command[1:], dict(env), printed, processes=1)
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise subprocess.CalledProcessError(1, command) from error
        return subprocess.CompletedProcess(command, 0, None if stdout is None else printed.read_text("utf-8"))


def _run_script(rank, arguments, environment, printed):
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(map(str, arguments))
    torch.set_num_threads(1)
    with printed.open("w", encoding="utf-8") as sys.stdout:
        runpy.run_path(sys.argv[0], run_name="__main__")
