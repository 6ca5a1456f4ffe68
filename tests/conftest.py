"""Settings of the whole test suite."""

import gc
import importlib
import os

import pytest
import torch


# No test may depend on a network: what looks for a file on the Hub is told at once that there is none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU Triton's kernels are interpreted; Triton wants to know when it's imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Where torchvision is installed, beside a torch that it wasn't built for too: before transformers imports it.
importlib.import_module("common")
# There is a test process for each core, and models here are too small for more than one thread.
torch.set_num_threads(1)


def pytest_configure(config):
    """Warnings are errors; these are the exceptions, none of which a user of READ could do anything about."""
    for reason in (
        # PEFT 0.21 asks transformers 5.23 by a name that transformers has just renamed.
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", reason)


def pytest_collection_finish(session):
    """Collections are made seldom: a tenth of the suite's time went into them."""
    gc.set_threshold(50_000)
    _keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """After each file."""
    yield
    if nextitem is None or nextitem.path != item.path:
        _keep()


def _keep():
    """What is there by now needs no collection, which each Trainer asks for: a third of a second less each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    """What was kept from collection goes when Python ends."""
    gc.unfreeze()
