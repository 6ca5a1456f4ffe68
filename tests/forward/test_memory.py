"""A forward leaves nothing behind: no graph, no cache, no states where nobody goes on from them."""

import gc
import pickle
import weakref

import pytest
import torch
from fresh import run_code
from generators import CACHE, empty_cache, generate, generator, prompt, random_ids, step
from helpers import adapted, adapter_parameters, batch_of, enable_checkpointing, loss_of
from models import bert_config, llama_config
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertModel, LlamaForCausalLM

from peft_read import ReadConfig
from peft_read.forward.call import RunningForward
from peft_read.forward.states_beside_cache import RecurrentStates


CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])


@pytest.fixture(autouse=True)
def _without_the_collector():
    """What is freed here is freed by counting references, as soon as nobody holds it."""
    gc.disable()  # what other tests left is no matter here, and collecting it takes a second
    yield
    gc.enable()


@pytest.fixture
def forwards(monkeypatch):
    """Weak references to all forwards that run."""
    made, of = [], RunningForward.of.__func__

    def note(cls, call):
        running = of(cls, call)
        made.append(weakref.ref(running))
        return running

    monkeypatch.setattr(RunningForward, "of", classmethod(note))
    return made


class Packed:
    """What autograd holds of a tensor that it keeps for the backward pass."""

    def __init__(self, tensor):
        # Detached: a node that keeps its own output would keep itself alive.
        self.tensor, self.size = tensor.detach(), tensor.untyped_storage().nbytes()


def alive(references):
    return sum(reference() is not None for reference in references)


@CELLS
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_a_dropped_loss(family, cell, forwards):
    """A forward with gradients of which nobody takes any: its graph is freed with its loss."""
    model, batch = adapted(family, cell=cell).train(), batch_of(family)
    saved = []

    def pack(tensor):
        packed = Packed(tensor)
        saved.append(weakref.ref(packed))
        return packed

    for _ in range(2):
        with saved_tensors_hooks(pack, lambda packed: packed.tensor):
            loss = loss_of(family, model, batch)
        assert alive(saved) > 10
        del loss
        assert alive(saved) == 0
    assert len(forwards) >= 2
    assert alive(forwards) == 0


@CELLS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_steps_with_checkpoints(cell, use_reentrant, forwards):
    """Neither forward nor backward pass leaves a call behind."""
    model, batch = adapted("llama", cell=cell).train(), batch_of("llama", padding="left")
    enable_checkpointing(model, use_reentrant)
    for _ in range(2):
        loss_of("llama", model, batch).backward()
    assert alive(forwards) == 0


def test_an_encoder_records_no_states(monkeypatch):
    """Nor does a decoder that is told to make no cache: there is nothing to go on from."""
    kept = []
    again, of = RunningForward.again, RunningForward.of.__func__
    monkeypatch.setattr(RunningForward, "of", classmethod(lambda cls, call: kept.append(of(cls, call)) or kept[-1]))
    monkeypatch.setattr(RunningForward, "again", lambda self: kept.append(again(self)) or kept[-1])
    adapted("bert")(**batch_of("bert"))
    adapted("t5_encoder")(**batch_of("t5_encoder"))
    adapted("llama")(**batch_of("llama"), use_cache=False)
    assert [running.left for running in kept] == [None, None, None]
    adapted("llama")(**batch_of("llama"), use_cache=True)
    assert len(kept[-1].left) == 2


@CELLS
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_caches_die_with_generate(family, cell, options, monkeypatch):
    """Its cache, and the states beside it, are freed when it ends."""
    made, init = [], RecurrentStates.__init__

    def note(self):
        init(self)
        made.append(weakref.ref(self))

    monkeypatch.setattr(RecurrentStates, "__init__", note)
    model = generator(family, cell)
    output = generate(model, prompt(family), **options)
    cache = weakref.ref(getattr(output, CACHE))
    assert made
    del output
    assert cache() is None
    assert alive(made) == 0


def saved_bytes(model, **batch):
    """What is kept for the backward pass at the end of a forward, and most at any time of both."""
    held = {"now": 0, "most": 0}

    def change(size):
        held["now"] += size
        held["most"] = max(held["most"], held["now"])

    def pack(tensor):
        packed = Packed(tensor)
        change(packed.size)
        weakref.finalize(packed, change, -packed.size)
        return packed

    with saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = model(**batch)[0].float().square().mean()
        after_forward = held["now"]
        loss.backward()
    return after_forward, held["most"]


@CELLS
@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_checkpoints_save_memory(shape, cell):
    """As much as without a recurrence: a fraction of what is kept for the backward pass otherwise."""

    def model_of(cell, checkpoints):
        torch.manual_seed(0)
        if shape == "bert":
            base = BertModel(bert_config(num_hidden_layers=8), add_pooling_layer=False)
        else:
            base = LlamaForCausalLM(llama_config(num_hidden_layers=8)).model
        model = get_peft_model(base, ReadConfig(r=2, cell=cell)).train()
        if checkpoints:
            enable_checkpointing(model)
        return model

    batch = {"input_ids": torch.randint(3, 49, (4, 64)), "attention_mask": torch.ones(4, 64, dtype=torch.long)}
    batch["attention_mask"][0, 40:] = 0
    batch |= {"use_cache": False} if shape == "llama" else {}
    with_recurrence = saved_bytes(model_of(cell, True), **batch)
    plain = saved_bytes(model_of("none", True), **batch)
    without_checkpoints = saved_bytes(model_of(cell, False), **batch)
    assert with_recurrence[0] <= 1.05 * plain[0]
    assert with_recurrence[1] < 0.5 * without_checkpoints[1]


CONTINUE = """
import pickle, sys
import torch
import peft_read
from generators import generator, random_ids, step
for family, cell, cache, before in torch.load(sys.argv[1], weights_only=False):
    if isinstance(cache, bytes):
        cache = pickle.loads(cache)
    model = generator(family, cell)
    for method, given in (("batch_repeat_interleave", 2), ("reorder_cache", torch.tensor([3, 1, 0, 2]))):
        getattr(cache, method)(given)
    rows = torch.arange(2).repeat_interleave(2)[torch.tensor([3, 1, 0, 2])]
    more = random_ids(4, 3, seed=1)
    with torch.no_grad():
        whole = step(family, model, torch.cat([before[rows], more], 1), use_cache=False).logits[:, -3:]
        torch.testing.assert_close(step(family, model, more, cache).logits, whole, rtol=0, atol=1e-5)
"""


@torch.no_grad()
def test_saved_caches_go_on_in_another_process(tmp_path):
    """Pickled or written by torch, their states with them, and what is done to rows there is done to both."""
    saved = []
    for family, cell in (("llama", "gru"), ("gpt2", "lstm"), ("bart", "rnn")):
        model, before = generator(family, cell), random_ids(2, 6)
        cache = empty_cache(family, model)
        step(family, model, before, cache)
        saved += [(family, cell, pickle.dumps(cache), before), (family, cell, cache, before)]
    torch.save(saved, tmp_path / "caches")
    run_code(CONTINUE, tmp_path / "caches")


def test_weights_need_no_collector():
    """A model is freed when nobody holds it, adapted or unloaded."""
    for unload in (False, True):
        model = adapted("bert", cell="gru")
        model(**batch_of("bert"))
        weights = [weakref.ref(p) for p in adapter_parameters(model).values()]
        if unload:
            model = model.unload()
        del model
        assert alive(weights) == 0
