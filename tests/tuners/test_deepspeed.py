"""DeepSpeed's ZeRO with two processes on CPUs, where it is installed: `.ci/deepspeed` installs it."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import devices
import pytest
import torch
from devices import HEADS, STEPS, run, same_predictions


pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed; .ci/deepspeed runs this"
    ),
    # The processes are started once, not once by each worker of pytest-xdist.
]
SCRIPT = Path(devices.__file__).with_name("zero.py")
STAGES = ("zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def found(folder):
    """What each of two processes found, by configuration, trainer and process."""
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    # The build of its communication, at first use, calls `ninja`.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    for stage in STAGES:
        port = str(devices.free_port())
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        command = [*start, str(SCRIPT), stage, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {
        (stage, name, rank): torch.load(folder / f"{name}-{stage}-{rank}.pt", weights_only=False)
        for stage in STAGES
        for name in devices.TRAINERS
        for rank in range(2)
    }


@pytest.fixture(scope="module")
def expected(folder):
    """What one process finds without DeepSpeed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: run(name, folder / f"{name}-1") for name in devices.TRAINERS}


@pytest.mark.parametrize("name", devices.TRAINERS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(stage, name, found, expected):
    """The losses of each step, the weights saved after them, and predictions, through the committed configurations."""
    one = expected[name]
    parts = ("loss", "grad_norm") if name in HEADS else ("loss", "task_loss", "pvla_loss", "grad_norm")
    for each in (found[stage, name, rank] for rank in range(2)):
        assert each.trained == STEPS
        for log, other in zip(each.logs, one.logs, strict=True):
            for part in parts:
                assert log[part] == pytest.approx(other[part], abs=1e-4), (log["step"], part)
        assert each.saved.keys() == one.saved.keys()
        for parameter, value in each.saved.items():
            torch.testing.assert_close(value, one.saved[parameter], rtol=0, atol=1e-5, msg=parameter)
        same_predictions(name, each, one)


@pytest.mark.parametrize("name", devices.TRAINERS)
def test_what_is_sharded(name, found):
    """ZeRO-3 leaves no process a whole weight outside of its call; ZeRO-2 leaves each of them all."""
    assert sum(size for _, size in found["zero3", name, 0].held.values()) == 0
    assert sum(size for _, size in found["zero2", name, 0].held.values()) > 20_000
