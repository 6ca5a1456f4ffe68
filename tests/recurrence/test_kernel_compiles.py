"""The Triton kernels compile to machine code, which takes no GPU, and are launched as Triton itself would."""

import pytest
from fresh import run_code


pytest.importorskip("triton")

COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches, targets = [], [("rnn_tanh", 80, 32), ("gru", 90, 32), ("lstm", 100, 64)]

class Utils:
    def load_binary(self, name, binary, shared, device):
        assert len(binary) > 1000
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 100_000}

    def unload_module(self, module):
        pass

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args):
        address = lambda arg: arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
        launches.append([address(arg) for arg in args])

class NoGPU:
    utils, launcher_cls, device = Utils(), Launcher, 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", targets[self.device][1], 32)

driver.set_active(NoGPU())
from peft_read.recurrence.dispatch import GATES
from peft_read.recurrence.chunked_triton import KernelScan, _Run, _compiled

for driver.active.device, (kind, _, size) in enumerate(targets):
    gates, memory = GATES[kind], kind == "lstm"
    x, first = torch.zeros(2, 100, size, requires_grad=True), torch.zeros(2, size, requires_grad=True)
    matrix, bias = torch.zeros(gates * size, size), torch.zeros(gates * size)
    starts = [first] if memory else [None]
    for start in starts * 2:
        args = (x, matrix, matrix, bias, bias, start, start if memory else None)
        outputs, _ = KernelScan.apply(kind, True, *args)
        outputs.sum().backward()
    KernelScan.apply(kind, False, *args)
    # Both passes, and one that keeps nothing for the backward pass; vanilla recurrences never do.
    assert len(_compiled) == (3 if gates > 1 else 2)
    assert len(launches) == 5

    # What is remembered is launched as Triton itself would launch it.
    _compiled.clear()
    states = x.detach()
    run = _Run(kind, states, backward=False)
    last = states[:, 0].contiguous() if memory else None
    start = first if memory else None
    inputs = torch.zeros(2, 100, gates * size)
    tensors = (inputs, matrix, bias, start, start, start, start, states, None, None, None, last)
    run.launch(tensors)
    run.launch(tensors)
    assert len(_compiled) == 1
    one, other = (launch[:6] + launch[7:] for launch in launches[-2:])  # without what Triton makes for its own hooks
    assert one == other
    _compiled.clear()
    launches.clear()
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """To machine code, which takes no GPU: the interpreter accepts more than the compiler. And they are launched."""
    run_code(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
