"""Caches and adapters: a cache goes on only with the adapters that have seen its tokens."""

import copy

import pytest
import torch
from generators import (
    DECODERS,
    ERROR,
    GENERATORS,
    assert_same,
    empty_cache,
    generate,
    generator,
    prompt,
    random_ids,
    step,
)
from helpers import strengthen

from peft_read import ReadConfig


STATIC = pytest.mark.parametrize("size", [None, 20], ids=["dynamic", "static"])
REFUSED = "can't continue from this cache"


def two_adapters(family):
    model = generator(family)
    model.add_adapter("second", ReadConfig(r=3, cell="lstm", target_modules=GENERATORS[family].targets))
    return strengthen(model, seed=1, adapter_name="second").eval()


def activate(model, name):
    model.base_model.disable_adapter_layers()
    if name != "__base__":
        model.set_adapter(name)
        model.base_model.enable_adapter_layers()


@STATIC
@pytest.mark.parametrize("family", ["llama", "mistral", "bart"])
@pytest.mark.parametrize(
    "names", [("__base__", "default"), ("default", "second"), ("default", "__base__", "default")], ids="-".join
)
@torch.no_grad()
def test_an_adapter_that_has_not_seen_the_tokens_is_refused(family, names, size):
    """A state of zero, or one from before the gap, would be a wrong answer without a word."""
    model = two_adapters(family)
    cache = empty_cache(family, model, size)
    *fill, last = names
    for name in fill:
        activate(model, name)
        step(family, model, random_ids(2, 3), cache)
    activate(model, last)
    with pytest.raises(ValueError, match=REFUSED):
        step(family, model, random_ids(2, 3), cache)


@STATIC
@torch.no_grad()
def test_a_cache_that_was_emptied_and_filled_without_the_adapter(size):
    """What the adapter knows of a cache ends where the cache is reset."""
    model = generator("llama")
    cache = empty_cache("llama", model, size)
    step("llama", model, random_ids(2, 5), cache)
    cache.reset()
    with model.disable_adapter():
        step("llama", model, random_ids(2, 5), cache)
    with pytest.raises(ValueError, match=REFUSED):
        step("llama", model, random_ids(2, 1), cache)


@torch.no_grad()
def test_a_cache_that_went_back_and_on_without_the_adapter():
    """Tokens are counted as seen only up to where the cache went back; without new ones it goes on from there."""
    model = generator("llama")
    cache, ids = empty_cache("llama", model), random_ids(2, 6)
    step("llama", model, ids, cache)
    with model.disable_adapter():
        step("llama", model, random_ids(2, 3), cache)
        twin = copy.deepcopy(cache)
        twin.crop(-5)
        step("llama", model, random_ids(2, 2), twin)
    cache.crop(-3)
    more = random_ids(2, 2, seed=1)
    whole = step("llama", model, torch.cat([ids, more], dim=1), use_cache=False).logits[:, 6:]
    torch.testing.assert_close(step("llama", model, more, cache).logits, whole, **ERROR)
    with pytest.raises(ValueError, match=REFUSED):
        step("llama", model, more, twin)


@STATIC
@torch.no_grad()
def test_rows_that_change_their_adapter_are_refused(size):
    """A row goes on with the adapter that has seen its tokens, or with none."""
    model = two_adapters("llama")
    cache, ids = empty_cache("llama", model, size), random_ids(3, 4)
    step("llama", model, ids, cache, adapter_names=["default", "second", "__base__"])
    others = [["second", "default", "__base__"], ["default", "second", "default"]]
    for names in others:
        with pytest.raises(ValueError, match=REFUSED):
            step("llama", model, ids[:, :1], copy.deepcopy(cache), adapter_names=names)
    with pytest.raises(ValueError, match=REFUSED):
        step("llama", model, ids[:, :1], copy.deepcopy(cache))
    step("llama", model, ids[:, :1], cache, adapter_names=["default", "second", "__base__"])


@pytest.mark.parametrize("family", [*DECODERS, "bart", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_batch_with_an_adapter_per_row(family, options):
    """Each prompt is continued as if its adapter were active for the whole batch."""
    model, batch, names = two_adapters(family), prompt(family), ["second", "__base__", "default"]
    mixed = generate(model, batch, **options, output_scores=True, adapter_names=names)
    for row, name in enumerate(names):
        activate(model, name)
        alone = generate(model, batch, **options, output_scores=True)
        activate(model, "default")
        assert torch.equal(mixed.sequences[row], alone.sequences[row])
        if "num_beams" in options:
            torch.testing.assert_close(mixed.sequences_scores[row], alone.sequences_scores[row], **ERROR)
            continue
        for mine, other in zip(mixed.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], other[row], **ERROR)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bart"])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["samples", "beams"],
)
def test_several_sequences_of_a_batch_with_an_adapter_per_row(family, options):
    """`generate` makes several rows of a prompt; all go with the prompt's adapter."""
    model, batch, names = two_adapters(family), prompt(family), ["second", "__base__", "default"]
    count = options["num_return_sequences"]
    mixed = generate(model, batch, **options, adapter_names=names).sequences.unflatten(0, (len(names), count))
    for row, name in enumerate(names):
        activate(model, name)
        alone = generate(model, batch, **options).sequences.unflatten(0, (len(names), count))
        activate(model, "default")
        assert torch.equal(mixed[row], alone[row])


@pytest.mark.parametrize("family", [*DECODERS, "bart"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_two_active_adapters(family, options):
    """Each keeps a state of its own."""
    model, batch = two_adapters(family), prompt(family)
    model.base_model.set_adapter(["default", "second"])
    without = {k: v for k, v in options.items() if k != "cache_implementation"}
    assert_same(generate(model, batch, **options), generate(model, batch, **without, use_cache=False))


@STATIC
@torch.no_grad()
def test_an_adapter_without_recurrence_continues_any_cache(size):
    """`cell='none'` has no state to miss."""
    model, ids = generator("llama", "none"), random_ids(2, 4)
    cache = empty_cache("llama", model, size)
    with model.disable_adapter():
        step("llama", model, ids, cache)
    step("llama", model, ids, cache)
