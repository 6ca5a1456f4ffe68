"""Lockstep: towers that meet without exchanging are those that run alone, and nothing of one gets into another."""

import pytest
import torch
from meetings import first, watch_blocks
from torch import nn
from towers_alone import Mixing, alone, calls_of, gradients, identity, loss_of, meets, prepare, watched
from trimodal_families import tower, tower_inputs

from peft_read.architectures.blocks import find_blocks
from peft_read.lockstep.coroutines import LockstepError, count_call, current_tower, meet, run_in_lockstep


TRIPLES = [
    ("vit", "ast", "bert"),
    ("timesformer", "wav2vec2", "roberta"),
    ("swin", "whisper", "t5"),
    ("vjepa2", "wavlm", "modernbert"),
]


def inside_stages(model):
    """Swin checkpoints stages as well as what is in them: leave it the latter, as blocks that meet need."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and any(
            b.startswith(f"{name}.") for b in find_blocks(model)
        ):
            module.gradient_checkpointing = False


MODES = [(mode, names) for mode in ("eval", "train", "autocast", "checkpoint") for names in TRIPLES]


# Of the others, WavLM doesn't end a backward pass with such checkpoints, alone either.
MODES += [("checkpoint_reentrant", names) for names in TRIPLES[:2]]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize(("mode", "names"), MODES, ids=lambda part: part if isinstance(part, str) else "-".join(part))
def test_outputs_and_gradients_are_those_of_the_towers_alone(mode, names):
    """Bit for bit, where the towers meet after each block, in every mode of training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        expected_towers = prepare([tower(name) for name in names], mode)
        expected = alone(names, expected_towers)
        towers = prepare(watched(names), mode)
        for model in towers:
            inside_stages(model)
        met = []
        actual = run_in_lockstep(calls_of(names, towers), lambda level, given: met.append(len(given)) or given)
    assert met == [3] * 4
    for name in names:
        assert torch.equal(actual[name].last_hidden_state, expected[name].last_hidden_state), name
    loss_of(expected).backward()
    loss_of(actual).backward()
    pairs = list(zip(gradients(towers), gradients(expected_towers), strict=True))
    assert len(pairs) > 100
    assert all(torch.equal(a, b) for a, b in pairs)


def embed(name, model):
    inputs = tower_inputs(name)
    if name == "bert":
        return model.embeddings(input_ids=inputs["input_ids"])
    return model.embeddings(next(iter(inputs.values())))


def test_gradients_are_those_of_a_loop_by_hand():
    """An exchange in all directions at every level, against the same written out block by block."""
    names = ("vit", "ast", "bert")
    towers = prepare(watched(names), "train")
    mixing = Mixing(names, 4)
    actual = run_in_lockstep(calls_of(names, towers), mixing)
    loss_of(actual).backward()
    by_lockstep = gradients([*towers, mixing])

    by_hand_towers = prepare([tower(name) for name in names], "train")
    by_hand_mixing = Mixing(names, 4)
    hidden = {name: embed(name, model) for name, model in zip(names, by_hand_towers, strict=True)}
    blocks = [[model.get_submodule(block) for block in find_blocks(model)] for model in by_hand_towers]
    for level, level_blocks in enumerate(zip(*blocks, strict=True)):
        hidden = {name: first(block(hidden[name])) for name, block in zip(names, level_blocks, strict=True)}
        hidden = by_hand_mixing(level, hidden)
    for name, model in zip(names, by_hand_towers, strict=True):
        norm = getattr(model, "layernorm", nn.Identity())
        hidden[name] = norm(hidden[name])
        assert torch.equal(hidden[name], actual[name].last_hidden_state)
    sum((states**2).mean() for states in hidden.values()).backward()
    by_loop = gradients([*by_hand_towers, by_hand_mixing])
    assert len(by_loop) > 100
    assert all(torch.equal(a, b) for a, b in zip(by_lockstep, by_loop, strict=True))


def test_levels_are_labels():
    """A tower that leaves levels out is absent there, and the others don't shift."""
    met = []
    run_in_lockstep(
        {"a": meets([0, 1, 2, 3]), "b": meets([1, 3]), "c": meets([2]), "d": meets([])},
        lambda level, given: met.append((level, sorted(given))) or given,
    )
    assert met == [(0, ["a"]), (1, ["a", "b"]), (2, ["a", "c"]), (3, ["a", "b"])]


def test_layerdrop_leaves_the_other_levels_alone():
    """A tower that skips blocks at random keeps the labels of those it runs."""
    model = tower("wav2vec2").train()
    model.config.layerdrop = 0.5
    watch_blocks(model, [])
    torch.manual_seed(0)
    met = []
    for _ in range(4):
        calls = {"audio": lambda: model(**tower_inputs("wav2vec2")), "text": meets(range(4))}
        run_in_lockstep(calls, lambda level, given: met.append((level, "audio" in given)) or given)
    assert [level for level, _ in met] == [0, 1, 2, 3] * 4
    assert 2 < sum(present for _, present in met) < 14


def test_results_and_replies_go_to_their_towers():
    assert run_in_lockstep({"b": meets([0], name="b"), "a": meets([0], name="a")}, identity) == {
        "b": [("b", 0)],
        "a": [("a", 0)],
    }
    assert list(run_in_lockstep({"b": meets([5]), "a": meets([0])}, identity)) == ["b", "a"]


def test_nobody_is_met_alone():
    assert meet(0, "payload") is None
    assert current_tower() is None
    assert count_call(nn.Identity()) == 0


def test_levels_that_fall_are_refused():
    with pytest.raises(LockstepError, match="a tower comes to level 1 after level 1"):
        run_in_lockstep({"a": meets([0, 1, 1])}, identity)


def test_a_forgotten_reply_is_an_error():
    with pytest.raises(LockstepError, match="level 0 has no reply for the b tower"):
        run_in_lockstep({"a": meets([0]), "b": meets([0])}, lambda level, given: {"a": None})


def test_hidden_states_are_collected_by_tower():
    """transformers collects what `output_hidden_states` asks for in a context variable."""
    names = ("vit", "ast", "bert")
    towers = watched(names)
    with torch.no_grad():
        calls = {
            name: lambda name=name, model=model: model(**tower_inputs(name), output_hidden_states=True)
            for name, model in zip(names, towers, strict=True)
        }
        expected = {name: call() for name, call in calls.items()}
        actual = run_in_lockstep(calls, identity)
    for name in names:
        assert len(actual[name].hidden_states) == 5
        pairs = zip(actual[name].hidden_states, expected[name].hidden_states, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_blocks_that_run_several_times_are_counted_by_run():
    model = tower("albert")
    counts = []
    block = model.get_submodule(find_blocks(model)[0])
    block.register_forward_hook(lambda module, *_: counts.append(count_call(module)))
    for _ in range(2):
        run_in_lockstep({"text": lambda: model(**tower_inputs("albert"))}, identity)
    assert counts == [0, 1, 2, 3] * 2
    model(**tower_inputs("albert"))
    assert counts[8:] == [0] * 4
