"""Blocks of a tower that meet, and note what they saw, without an adapter."""

import torch
from torch import nn

from peft_read.architectures.blocks import find_blocks
from peft_read.lockstep.coroutines import count_call, meet


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


class Meeting(nn.Module):
    """Stands for an adapted block: what it gives goes to a meeting, and the reply on through the tower."""

    def __init__(self, block, levels, seen):
        super().__init__()
        self.block, self.levels, self.seen = block, levels, seen

    def forward(self, *args, **kwargs):
        output = self.block(*args, **kwargs)
        level = self.levels[count_call(self)]
        hidden = meet(level, first(output))
        if hidden is None:
            return output
        self.seen.append(hidden)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def watch_blocks(model, seen):
    """Let every block of a tower meet after it, and note its hidden states in `seen`."""
    levels: dict[str, list[int]] = {}
    for level, name in enumerate(find_blocks(model)):
        levels.setdefault(name, []).append(level)
    for name, of_block in levels.items():
        around, _, child = name.rpartition(".")
        setattr(model.get_submodule(around), child, Meeting(model.get_submodule(name), of_block, seen))
