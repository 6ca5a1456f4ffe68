"""The trimodal model's towers, and those of a composite of one's own, under a tuner that lets them exchange."""

import pytest
import torch
from torch import nn
from trimodal_families import BATCH, tower, tower_inputs
from trimodal_models import fused, inputs_of, model_of

from peft_read.architectures.blocks import find_blocks
from peft_read.lockstep import LockstepBatch, TowerBatch, run_towers
from peft_read.lockstep.coroutines import meet
from peft_read.lstta.layer import show_hidden_states


# Some DeBERTa's code is scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def meet_after_blocks(model):
    """Stands for adapters: lets every tower meet after its first block, to be told the mean of all."""
    for modality, part in model.towers().items():
        block = {"vision": lambda: part.layers[0], "audio": lambda: part.layers[0]}.get(modality)  # noqa: B023
        block = block() if block else part.encoder.layer[0]

        def hook(module, args, output):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            reply = meet(0, hidden)
            reply = hidden if reply is None else reply
            return reply if isinstance(output, torch.Tensor) else (reply, *output[1:])

        block.register_forward_hook(hook)


BATCHES: list[LockstepBatch] = []


def tell_all_the_mean(batch):
    BATCHES.append(batch)

    def exchange(level, hidden):
        mean = sum(states.mean() for states in hidden.values())
        return {name: states + mean for name, states in hidden.items()}

    return exchange


@torch.no_grad()
def test_a_tuner_lets_towers_exchange():
    """`make_exchange` is given the running batch; without it, and after it, the model is as it was."""
    model = model_of()
    expected = fused(model, **inputs_of())
    meet_after_blocks(model)
    assert torch.equal(fused(model, **inputs_of()), expected)
    model.make_exchange = tell_all_the_mean
    BATCHES.clear()
    frame_mask = torch.tensor([[1] * 4, [1, 0, 0, 0]])
    exchanged = fused(model, **inputs_of(), frame_mask=frame_mask)
    assert (exchanged - expected).abs().max() > 1e-3
    (batch,) = BATCHES
    assert batch.size == BATCH
    assert list(batch.towers) == ["vision", "audio", "text"]
    assert torch.equal(batch.towers["vision"].mask, frame_mask.bool())
    assert batch.towers["audio"].mask is None
    assert batch.towers["audio"].layout.steps == 15
    del model.make_exchange
    assert torch.equal(fused(model, **inputs_of()), expected)


class OwnComposite(nn.Module):
    """A composite model of somebody's own, as in the docstring of `run_towers`."""

    def __init__(self):
        super().__init__()
        self.vision_model, self.text_model = tower("vit"), tower("bert")

    def forward(self, pixel_values, input_ids, attention_mask):
        batch = LockstepBatch(
            size=len(input_ids),
            towers={
                "vision": TowerBatch.of("vision", self.vision_model, len(input_ids), pixel_values.shape[1]),
                "text": TowerBatch.of("text", self.text_model, *input_ids.shape, mask=attention_mask),
            },
        )
        calls = {
            "vision": lambda: self.vision_model(pixel_values.flatten(0, 1)),
            "text": lambda: self.text_model(input_ids, attention_mask),
        }
        return run_towers(self, calls, batch)


@torch.no_grad()
def test_a_composite_of_ones_own_takes_part():
    model = OwnComposite()
    model.towers = lambda: {"vision": model.vision_model, "text": model.text_model}
    inputs = inputs_of(("vit", "bert"))
    before = model(**inputs)
    meet_after_blocks(model)
    assert torch.equal(model(**inputs)["text"].last_hidden_state, before["text"].last_hidden_state)
    model.make_exchange = tell_all_the_mean
    assert (model(**inputs)["text"].last_hidden_state - before["text"].last_hidden_state).abs().max() > 1e-3


class Shift(nn.Module):
    """A block with an adapter behind it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        output = self.block(*args, **kwargs)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        shifted = hidden + 0.5
        show_hidden_states(hidden, shifted)
        return shifted if isinstance(output, torch.Tensor) else (shifted, *output[1:])

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


@pytest.mark.parametrize("family", ["vit", "timesformer", "ast", "wav2vec2", "bert", "mpnet", "t5", "modernbert"])
@torch.no_grad()
def test_hidden_states_are_the_adapted_ones(family):
    """Of models that collect by hooks, and of those that do so in their forward: what the next block is given."""
    model = tower(family)
    seen = []
    for name in find_blocks(model):
        parent, _, child = name.rpartition(".")
        block = Shift(model.get_submodule(name))
        setattr(model.get_submodule(parent), child, block)
        block.block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = model(**tower_inputs(family), output_hidden_states=True)
    inside = [states for states in outputs.hidden_states if states.shape == seen[1].shape]
    assert any(torch.equal(states, seen[1]) for states in inside)
