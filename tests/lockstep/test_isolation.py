"""Nothing of one tower gets into another or into the caller, or stays: errors, modes, threads, checkpoints."""

import contextvars
import gc
import runpy
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import greenlet
import pytest
import torch
from meetings import watch_blocks
from torch import nn
from torch.utils.checkpoint import checkpoint
from towers_alone import Mixing, alone, calls_of, gradients, identity, loss_of, meets, prepare, watched
from trimodal_families import enable_checkpointing, tower, tower_inputs

from peft_read.lockstep import coroutines as lockstep
from peft_read.lockstep.coroutines import LockstepError, current_tower, meet, run_in_lockstep


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["tower", "exchange"])
def test_an_error_unwinds_all_towers(kind, place):
    """It names its tower; context managers and cleaning hooks of the others run; the towers can be used again."""
    names = ("vit", "ast", "bert")
    towers = watched(names)
    left, greenlets = [], []
    for name, model in zip(names, towers, strict=True):
        model.register_forward_pre_hook(lambda *_: greenlets.append(greenlet.getcurrent()))
        model.register_forward_hook(lambda *_, name=name: left.append(name), always_call=True)

    def fail(*_):
        raise kind("broken")

    def exchange(level, given):
        if place == "exchange" and level == 2:
            fail()
        return given

    handle = towers[2].encoder.layer[2].attention.register_forward_hook(fail) if place == "tower" else None
    with torch.no_grad(), pytest.raises(kind, match="broken") as caught:
        run_in_lockstep(calls_of(names, towers), exchange)
    notes = getattr(caught.value, "__notes__", [])
    assert notes == (["(raised in the bert tower, which ran in lockstep)"] if place == "tower" else [])
    assert {"vit", "ast"} <= set(left)
    assert torch.is_grad_enabled()
    assert len(greenlets) == 3
    assert all(tower_greenlet.dead for tower_greenlet in greenlets)
    if handle:
        handle.remove()
    with torch.no_grad():
        expected = alone(names, [tower(name) for name in names])
        actual = run_in_lockstep(calls_of(names, towers), identity)
    assert all(torch.equal(actual[n].last_hidden_state, expected[n].last_hidden_state) for n in names)


def test_an_error_of_a_tower_that_is_unwound_is_noted():
    def stubborn():
        try:
            meet(0, None)
        finally:
            raise OSError("can't clean up")

    with pytest.raises(ValueError, match="broken") as caught:
        run_in_lockstep({"a": stubborn, "b": lambda: int("broken")}, identity)
    assert any("the a tower" in note and "can't clean up" in note for note in caught.value.__notes__)


def test_a_tower_that_goes_on_while_it_is_unwound_does_not_meet_again():
    seen = []

    def stubborn():
        try:
            meet(0, None)
        except Exception:
            meet(1, None)
            seen.append("met")

    with pytest.raises(ValueError, match="broken"):
        run_in_lockstep({"a": stubborn, "b": lambda: int("broken")}, identity)
    assert not seen


@pytest.mark.parametrize("order", ["abc", "acb", "bac"])
def test_modes_stay_with_their_tower(order):
    """A tower that holds no_grad or autocast open across its blocks doesn't share it with others or the exchange.

    Wherever it stands: the exchange runs after the last one has stopped.
    """
    seen = {}

    def note(name):
        seen.setdefault(name, []).append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    def plain(name):
        def run():
            for level in range(2):
                note(name)
                meet(level, None)
            note(name)

        return run

    def without_gradients():
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            plain("b")()
            assert torch.get_autocast_dtype("cpu") == torch.float16

    def exchange(level, given):
        note("exchange")
        return given

    before = torch.get_autocast_dtype("cpu")
    towers = {"a": plain("a"), "b": without_gradients, "c": plain("c")}
    run_in_lockstep({name: towers[name] for name in order}, exchange)
    assert seen["a"] == seen["c"] == [(True, False)] * 3
    assert seen["b"] == [(False, True)] * 3
    assert seen["exchange"] == [(True, False)] * 2
    assert torch.get_autocast_dtype("cpu") == before


def test_towers_begin_with_the_modes_of_the_caller():
    seen = []

    def run():
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        meet(0, None)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run_in_lockstep({"a": run, "b": run}, identity)
    assert seen == [(False, True)] * 2


def test_inference_mode_is_that_of_the_whole_run():
    with torch.inference_mode():
        run_in_lockstep({"a": meets([0]), "b": meets([0])}, identity)

    def inference():
        with torch.inference_mode():
            meet(0, None)

    with pytest.raises(LockstepError, match="a tower holds torch"):
        run_in_lockstep({"a": inference, "b": meets([0])}, identity)
    assert not torch.is_inference_mode_enabled()


def test_context_variables_stay_with_their_tower():
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("caller")
    seen = []

    def run(name):
        def call():
            seen.append(variable.get())
            variable.set(name)
            meet(0, None)
            seen.append(variable.get())

        return call

    run_in_lockstep({"a": run("a"), "b": run("b")}, lambda level, given: seen.append(variable.get()) or given)
    assert seen == ["caller", "caller", "caller", "a", "b"]
    assert variable.get() == "caller"


def test_runs_can_be_nested():
    def nested():
        inner = run_in_lockstep({"x": meets([0, 1], name="x"), "y": meets([1], name="y")}, identity)
        return inner, meet(0, "outer"), current_tower()

    assert run_in_lockstep({"a": nested, "b": meets([0])}, identity)["a"] == (
        {"x": [("x", 0), ("x", 1)], "y": [("y", 1)]},
        "outer",
        "a",
    )


def test_a_greenlet_inside_of_a_tower_is_refused():
    with pytest.raises(LockstepError, match="in a greenlet inside of the tower's own"):
        run_in_lockstep({"a": lambda: greenlet.greenlet(meets([0])).switch()}, identity)


def test_runs_inside_of_a_foreign_greenlet():
    run = greenlet.greenlet(lambda: run_in_lockstep({"a": meets([0]), "b": meets([0])}, identity))
    assert list(run.switch()) == ["a", "b"]


def test_threads_share_a_model():
    """Four threads, each with its own run of the same towers."""
    names = ("vit", "ast", "bert")
    towers = watched(names)
    with torch.no_grad():
        expected = alone(names, [tower(name) for name in names])
    barrier = threading.Barrier(4)

    def run(_):
        barrier.wait()
        with torch.no_grad():
            return [run_in_lockstep(calls_of(names, towers), identity) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(run, range(4)):
            for output in outputs:
                assert all(torch.equal(output[n].last_hidden_state, expected[n].last_hidden_state) for n in names)


@pytest.mark.parametrize("train", [True, False])
def test_nothing_keeps_activations_alive(train):
    """No reference cycle: they are gone with the outputs, without the garbage collector."""
    names = ("vit", "ast", "bert")
    towers = [tower(name).requires_grad_(train) for name in names]
    notes: list = []
    for model in towers:
        watch_blocks(model, notes)
    gc.collect()
    gc.disable()
    try:
        outputs = run_in_lockstep(calls_of(names, towers), lambda level, given: {n: h * 1 for n, h in given.items()})
        alive = [weakref.ref(hidden) for hidden in notes]
        notes.clear()
        if train:
            loss_of(outputs).backward()
        del outputs
        assert len(alive) == 12
        assert not [reference for reference in alive if reference() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_meeting_blocks_is_refused(use_reentrant):
    """A checkpoint around several blocks would meet again when it recomputes them."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def stage(hidden):
        for level, layer in enumerate(layers):
            hidden = meet(level, layer(hidden))
        return hidden

    def run():
        return checkpoint(stage, torch.ones(1, 4, requires_grad=True), use_reentrant=use_reentrant)

    with pytest.raises(LockstepError, match="in the backward pass" if use_reentrant else "checkpointed"):
        run_in_lockstep({"a": run, "b": meets([0, 1])}, identity)["a"].sum().backward()


def test_swins_checkpointed_stages_are_refused():
    model = watched(["swin"])[0].train().requires_grad_(True)
    enable_checkpointing(model, use_reentrant=False)
    with pytest.raises(LockstepError, match="inside of a part that is checkpointed") as caught:
        run_in_lockstep({"vision": lambda: model(**tower_inputs("swin"))}, identity)
    assert "vision tower" in caught.value.__notes__[0]
    del caught
    gc.collect()  # torch 2.11 leaves a checkpoint that was refused only when its frames are freed


def test_a_run_inside_of_a_checkpoint_is_recomputed_as_a_whole():
    names = ("vit", "bert")
    towers = prepare(watched(names), "train")
    mixing = Mixing(names, 4)

    def run(scale):
        return loss_of(run_in_lockstep(calls_of(names, towers), mixing)) * scale

    run(torch.ones((), requires_grad=True)).backward()
    expected = gradients([*towers, mixing])
    for module in [*towers, mixing]:
        module.zero_grad()
    checkpoint(run, torch.ones((), requires_grad=True), use_reentrant=False).backward()
    assert all(torch.equal(a, b) for a, b in pairwise_of(gradients([*towers, mixing]), expected))


def pairwise_of(left, right):
    return zip(left, right, strict=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden):
        return self.linear(hidden).sin()


class Tower(nn.Module):
    """Two blocks that meet after each."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden):
        for level, block in enumerate(self.blocks):
            hidden = meet(level, block(hidden))
        return hidden


@pytest.mark.parametrize("what", ["blocks", "all"])
def test_compiled_blocks_and_compiled_runs_are_right(what):
    """Blocks compile without a graph break; the run itself stays outside of graphs."""
    torch._dynamo.reset()
    towers = {"a": Tower(0), "b": Tower(1)}
    inputs = torch.ones(2, 4)

    @torch.no_grad()
    def run():
        calls = {name: lambda model=model: model(inputs) for name, model in towers.items()}
        return run_in_lockstep(calls, lambda level, given: {"a": given["a"] + given["b"], "b": given["b"] * 2})

    expected = run()
    if what == "all":
        actual = torch.compile(run, backend="eager")()
    else:
        for model in towers.values():
            for block in model.blocks:
                block.compile(backend="eager", fullgraph=True)
        actual = run()
    assert all(torch.equal(actual[name], states) for name, states in expected.items())


def test_greenlet_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(ImportError, match="pip install greenlet"):
        runpy.run_path(lockstep.__file__)


def test_dropout_is_reproducible():
    names = ("vit", "bert")
    towers = watched(names)
    for model in towers:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        losses.append(loss_of(run_in_lockstep(calls_of(names, towers), identity)))
    assert all(torch.equal(a, b) for a, b in pairwise(losses))
