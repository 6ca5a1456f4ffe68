"""Towers alone and those that meet, an exchange between them, and their gradients."""

import torch
from meetings import watch_blocks
from torch import nn
from trimodal_families import enable_checkpointing, tower, tower_inputs

from peft_read.lockstep.coroutines import meet


def identity(level, payloads):
    return payloads


def calls_of(names, towers):
    return {
        name: lambda name=name, model=model: model(**tower_inputs(name))
        for name, model in zip(names, towers, strict=True)
    }


def alone(names, towers):
    return {name: call() for name, call in calls_of(names, towers).items()}


def watched(names):
    towers = [tower(name) for name in names]
    for model in towers:
        watch_blocks(model, [])
    return towers


def loss_of(outputs):
    return sum((output.last_hidden_state.float() ** 2).mean() for output in outputs.values())


def gradients(towers):
    return [p.grad.clone() for model in towers for p in model.parameters() if p.grad is not None]


def prepare(towers, mode):
    """Put towers into a mode of training; everything is trained, so that all gradients can be compared."""
    for model in towers:
        model.train(mode != "eval").requires_grad_(True)
        if mode.startswith("checkpoint"):
            enable_checkpointing(model, mode == "checkpoint_reentrant")
    return towers


class Mixing(nn.Module):
    """An exchange in which every tower hears of all others."""

    def __init__(self, names, levels, width=32, r=8):
        super().__init__()
        torch.manual_seed(1)
        self.down = nn.ModuleList([nn.ModuleDict({n: nn.Linear(width, r) for n in names}) for _ in range(levels)])
        self.up = nn.ModuleList([nn.ModuleDict({n: nn.Linear(r, width) for n in names}) for _ in range(levels)])

    def forward(self, level, hidden):
        down, up = self.down[level], self.up[level]
        heard = sum(down[name](states).flatten(0, -2).mean(0) for name, states in hidden.items())
        return {name: states + up[name](torch.tanh(down[name](states) + heard)) for name, states in hidden.items()}


def meets(levels, log=None, name=""):
    def run():
        replies = []
        for level in levels:
            if log is not None:
                log.append((name, level))
            replies.append(meet(level, (name, level)))
        return replies

    return run
