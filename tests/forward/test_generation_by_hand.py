"""Caches that somebody's own loop fills, takes back, copies and selects from give the logits of one whole forward."""

import copy

import pytest
import torch
import transformers
from generators import CACHE, DECODERS, ERROR, GENERATORS, empty_cache, generator, random_ids, step
from helpers import adapter_parameters
from packaging.version import parse


CELLS = [("gru", family) for family in GENERATORS] + [(c, f) for c in ("rnn", "lstm") for f in ("llama", "bart")]
EVERY_MODEL = pytest.mark.parametrize(("cell", "family"), CELLS)
EVERY_DECODER = pytest.mark.parametrize(("cell", "family"), [row for row in CELLS if row[1] in DECODERS])


@torch.no_grad()
def assert_continues(family, model, cache, before, ids):
    """`ids` after the tokens `before`, which the cache holds, get the logits of one forward over all of them."""
    whole = step(family, model, torch.cat([before, ids], dim=1), use_cache=False).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(step(family, model, ids, cache).logits, whole, **ERROR)


@torch.no_grad()
def filled(family, model, ids, **options):
    cache = empty_cache(family, model, **options)
    step(family, model, ids, cache)
    return cache


@EVERY_MODEL
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_pieces_of_any_length(family, cell, static):
    """Token by token and several at once."""
    model, ids = generator(family, cell), random_ids(2, 13)
    cache, start = empty_cache(family, model, size=20 if static else None), 0
    for length in (3, 1, 1, 5, 1, 2):
        end = start + length
        assert_continues(family, model, cache, ids[:, :start], ids[:, start:end])
        start = end


@EVERY_MODEL
@pytest.mark.parametrize("removed", [0, 1, 4])
def test_crop_and_another_branch(family, cell, removed):
    """A cache that goes back a few tokens and on with others, twice."""
    model, ids, branches = generator(family, cell), random_ids(2, 9), random_ids(2, 8, seed=1)
    cache = filled(family, model, ids, goes_back=True)
    for branch in branches.split(4, dim=1):
        cache.crop(-removed)
        ids = ids[:, : ids.shape[1] - removed]
        assert_continues(family, model, cache, ids, branch)
        ids = torch.cat([ids, branch], dim=1)


@EVERY_MODEL
def test_copied_prefix(family, cell):
    """One prefix, continued in copies of its cache and in the cache itself: none sees the others' tokens."""
    model, prefix = generator(family, cell), random_ids(2, 6)
    cache = filled(family, model, prefix)
    copies = [copy.deepcopy(cache), copy.deepcopy(cache), cache]
    branches = [random_ids(2, 4, seed=seed) for seed in (1, 2, 3)]
    for one, branch in zip(copies, branches, strict=True):
        assert_continues(family, model, one, prefix, branch)
    for one, branch in zip(copies, branches, strict=True):
        assert_continues(family, model, one, torch.cat([prefix, branch], dim=1), branch[:, :2])


@EVERY_MODEL
def test_a_copy_follows_what_is_done_to_it(family, cell):
    """Going back, or another order of rows, in a copy moves the copy's states, not the original's."""
    model, ids = generator(family, cell), random_ids(3, 6)
    cache = filled(family, model, ids, goes_back=True)
    twin, order = copy.deepcopy(cache), torch.tensor([2, 0, 1])
    twin.reorder_cache(order)
    twin.crop(-2)
    cache.crop(0)
    assert_continues(family, model, cache, ids, random_ids(3, 3, seed=1))
    assert_continues(family, model, twin, ids[order, :4], random_ids(3, 3, seed=2))


@EVERY_MODEL
def test_rows_are_repeated_selected_and_reordered(family, cell):
    """Whatever happens to the rows of a cache, each goes on from its own tokens."""
    model, ids = generator(family, cell), random_ids(3, 6)
    cache = filled(family, model, ids)
    cache.batch_repeat_interleave(2)
    ids = ids.repeat_interleave(2, dim=0)
    assert_continues(family, model, cache, ids, more := random_ids(6, 2, seed=1))
    ids, chosen = torch.cat([ids, more], dim=1), torch.tensor([4, 0, 5, 2])
    cache.batch_select_indices(chosen)
    assert_continues(family, model, cache, ids[chosen], more := random_ids(4, 2, seed=2))
    ids, order = torch.cat([ids[chosen], more], dim=1), torch.tensor([3, 3, 0, 1])
    cache.reorder_cache(order)
    assert_continues(family, model, cache, ids[order], random_ids(4, 2, seed=3))


@EVERY_MODEL
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_reset_and_reuse(family, cell, static):
    """A cache that was emptied begins anew, for as many rows as are given then."""
    if not (static and family in DECODERS) and parse(transformers.__version__) < parse("5.23"):
        pytest.skip("there transformers overwrites such a cache with zeros, which stay in it")
    model, ids = generator(family, cell), random_ids(2, 6)
    cache = filled(family, model, ids, size=20 if static else None)
    cache.reset()
    ids = random_ids(2 if static else 3, 9, seed=1)
    assert_continues(family, model, cache, ids[:, :0], ids[:, :5])
    assert_continues(family, model, cache, ids[:, :5], ids[:, 5:])


@EVERY_MODEL
def test_gradients_through_a_cache(family, cell):
    """Two pieces with a cache between them have the gradients of one forward: the state carries them."""
    model, ids = generator(family, cell), random_ids(2, 9)
    probe = torch.randn(9, 1, generator=torch.Generator().manual_seed(0))

    def gradients(logits):
        model.zero_grad()
        (logits.log_softmax(-1)[..., 5:6] * probe).mean().backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}

    expected = gradients(step(family, model, ids, use_cache=False).logits)
    cache = empty_cache(family, model)
    pieces = [step(family, model, piece, cache).logits for piece in (ids[:, :4], ids[:, 4:])]
    actual = gradients(torch.cat(pieces, dim=1))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-4 * scale)


@EVERY_MODEL
@pytest.mark.parametrize("return_dict", [False, True])
@torch.no_grad()
def test_a_cache_that_the_model_makes(family, cell, return_dict):
    """Nobody passed one: it is in the output, a tuple too."""
    model, ids = generator(family, cell), random_ids(2, 6)
    output = step(family, model, ids, use_cache=True, return_dict=return_dict)
    cache = getattr(output, CACHE) if return_dict else next(part for part in output if hasattr(part, "update"))
    assert_continues(family, model, cache, ids, random_ids(2, 4, seed=1))


@EVERY_DECODER
@torch.no_grad()
def test_inference_mode_and_back(family, cell):
    """A cache filled in inference mode goes on outside of it, where its tensors can't be written to."""
    model, ids = generator(family, cell), random_ids(2, 6)
    with torch.inference_mode():
        cache = filled(family, model, ids)
    assert_continues(family, model, cache, ids, random_ids(2, 4, seed=1))


@EVERY_DECODER
@torch.no_grad()
def test_more_tokens_than_a_block(family, cell, monkeypatch):
    """The states' memory grows in blocks: across several of them nothing is lost."""
    monkeypatch.setattr("peft_read.forward.states_beside_cache._BLOCK", 3)
    model, ids = generator(family, cell), random_ids(2, 20)
    cache = filled(family, model, ids[:, :2])
    for end in range(2, 20):
        assert_continues(family, model, cache, ids[:, :end], ids[:, end : end + 1])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@torch.no_grad()
def test_a_module_called_in_several_places(cell):
    """Blocks that share their feed-forward part keep a state for each place, in the order of the calls."""
    model, ids = generator("llama", cell), random_ids(2, 9)
    first, second = model.get_base_model().model.layers
    second.mlp = first.mlp
    cache = empty_cache("llama", model)
    for start in range(0, 9, 3):
        assert_continues("llama", model, cache, ids[:, :start], ids[:, start : start + 3])
    cache.crop(-4)
    assert_continues("llama", model, cache, ids[:, :5], ids[:, 5:])
