"""Settings of the examples' tests."""

import subprocess
from types import SimpleNamespace

import common.processes
import pytest
from fresh import run_script


@pytest.fixture(autouse=True)
def scripts_are_forked(monkeypatch):
    """A process that a script starts is forked from one that has imported what it needs, which spares seconds."""
    monkeypatch.setattr(common.processes, "subprocess", SimpleNamespace(run=run_script, PIPE=subprocess.PIPE))
