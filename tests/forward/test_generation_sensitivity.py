"""The tests of generation can tell: each mechanism that carries the state, taken away, changes logits by far."""

import copy
from functools import partial

import pytest
import torch
from generators import (
    VISIBLE,
    difference,
    empty_cache,
    generate,
    generator,
    prompt,
    random_ids,
    step,
)
from helpers import hide_masks
from test_generation import BATCH_MODES, assistant_of, repeating

from peft_read.forward import states_beside_cache
from peft_read.forward.arguments import own_cache
from peft_read.forward.states_beside_cache import StateHistory


FAMILIES = ["llama", "gpt2", "opt", "mistral", "mixtral", "bart", "t5", "whisper"]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def forget(monkeypatch):
    """Start each forward from zero."""
    monkeypatch.setattr("peft_read.read.layer.state_before", lambda *_: None)


def keep_rows(monkeypatch, method):
    """Don't follow what is done to the rows of a cache."""
    monkeypatch.setitem(states_beside_cache._CHANGES, method, lambda *_: None)


def never_go_back(monkeypatch):
    """Take the state after the token that was computed last, whether or not it was taken back since."""
    write = StateHistory.write

    def note(self, position, states, capacity):
        write(self, position, states, capacity)
        self.last = self._steps[:, position + states.shape[1] - 1]

    monkeypatch.setattr(StateHistory, "write", note)
    monkeypatch.setattr(StateHistory, "before", lambda self, _: self.last)


def with_and_without(run, monkeypatch, remove):
    right = run()
    remove(monkeypatch)
    return difference(run(), right)


@EVERY_FAMILY
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_state(family, mode, monkeypatch):
    """Without a state to go on from every mode fails."""
    run = partial(generate, generator(family), prompt(family), **BATCH_MODES[mode])
    assert with_and_without(run, monkeypatch, forget) > VISIBLE


@EVERY_FAMILY
@pytest.mark.parametrize("mode", ["beams", "several beams", "static beams"])
def test_reorder(family, mode, monkeypatch):
    """Beams that change places without their states fail."""
    run = partial(generate, generator(family), prompt(family), **BATCH_MODES[mode])
    assert with_and_without(run, monkeypatch, partial(keep_rows, method="reorder_cache")) > VISIBLE


@EVERY_FAMILY
def test_going_back_in_prompt_lookup(family, monkeypatch):
    """Some of the drafts are rejected: a state that stays at their end fails."""
    run = partial(generate, generator(family), repeating(family), max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert with_and_without(run, monkeypatch, never_go_back) > VISIBLE


@EVERY_FAMILY
def test_going_back_in_assisted_decoding(family, monkeypatch):
    """The same for drafts of another model."""
    options = {"max_new_tokens": 12, "assistant_model": assistant_of(family, "gru")}
    run = partial(generate, generator(family), repeating(family), **options)
    assert with_and_without(run, monkeypatch, never_go_back) > VISIBLE


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral", "mixtral", "t5"])
@pytest.mark.parametrize("mode", ["greedy", "static"])
def test_masks(family, mode, monkeypatch):
    """Padding on the left that is taken for tokens shows in the padded rows, and in them only."""
    run = partial(generate, generator(family), prompt(family), **BATCH_MODES[mode])
    right = run()
    hide_masks(monkeypatch)
    full, *padded = (run().logits[0] - right.logits[0]).abs().amax(-1)
    assert full < 1e-5
    assert min(padded) > VISIBLE


@EVERY_FAMILY
@pytest.mark.parametrize("method", ["batch_select_indices", "reorder_cache"])
@torch.no_grad()
def test_rows(family, method, monkeypatch):
    """Rows that are selected or reordered without their states fail."""
    keep_rows(monkeypatch, method)
    model, ids, order = generator(family), random_ids(3, 6), torch.tensor([2, 0, 1])
    cache = empty_cache(family, model)
    step(family, model, ids, cache)
    getattr(cache, method)(order)
    more = random_ids(3, 3, seed=1)
    right = step(family, model, torch.cat([ids[order], more], dim=1), use_cache=False).logits[:, 6:]
    assert (step(family, model, more, cache).logits - right).abs().max() > VISIBLE


@EVERY_FAMILY
@torch.no_grad()
def test_copies(family):
    """States that two copies of a cache shared would fail."""
    model, prefix = generator(family), random_ids(2, 6)
    cache = empty_cache(family, model)
    step(family, model, prefix, cache)
    twin = copy.deepcopy(cache)
    shared, own = (states_beside_cache.RecurrentStates.of(own_cache(c)) for c in (cache, twin))
    assert shared is not own
    own.histories = shared.histories
    for one, seed in ((cache, 1), (twin, 2)):
        step(family, model, random_ids(2, 4, seed=seed), one)
    end = random_ids(2, 2, seed=3)
    whole = torch.cat([prefix, random_ids(2, 4, seed=1), end], dim=1)
    right = step(family, model, whole, use_cache=False).logits[:, -2:]
    assert (step(family, model, end, cache).logits - right).abs().max() > VISIBLE
