"""Generation with a key-value cache gives what generation without one gives, in every mode and family."""

import pytest
import torch
import transformers
from generators import (
    CACHE,
    DECODERS,
    ERROR,
    GENERATORS,
    IMAGE_TOKEN,
    NEW_TOKENS,
    PROMPTS,
    assert_same,
    empty_cache,
    generate,
    generator,
    prompt,
    random_ids,
)
from packaging.version import parse


BATCH_MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "penalty": {"repetition_penalty": 1.5},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
}
CELLS = [("gru", family) for family in GENERATORS] + [(c, f) for c in ("rnn", "lstm") for f in ("llama", "bart")]
EVERY_MODEL = pytest.mark.parametrize(("cell", "family"), CELLS)
EVERY_DECODER = pytest.mark.parametrize(("cell", "family"), [row for row in CELLS if row[1] in DECODERS])


def uncached(model, batch, **options):
    return generate(model, batch, **options, use_cache=False)


@EVERY_MODEL
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_padded_batch(family, cell, mode):
    """Prompts of different lengths at once, padded on the left."""
    model, batch, options = generator(family, cell), prompt(family), BATCH_MODES[mode]
    without = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert_same(generate(model, batch, **options), uncached(model, batch, **without))


@EVERY_MODEL
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_padded_row_is_the_row_alone(family, cell, options):
    """What a prompt is continued with doesn't depend on the padding that its batch needs."""
    model, batch = generator(family, cell), prompt(family)
    together = generate(model, batch, **options)
    for row in range(len(PROMPTS)):
        keep = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
        alone = {k: v[row : row + 1] if v.ndim > 2 else v[row : row + 1, keep] for k, v in batch.items()}
        alone = generate(model, alone, **options)
        assert torch.equal(together.sequences[row, -NEW_TOKENS:], alone.sequences[0, -NEW_TOKENS:])
        for step, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], expected[0], **ERROR)


@EVERY_DECODER
@pytest.mark.parametrize("size", [1, 3, 4])
def test_prefill_in_chunks(family, cell, size):
    """The prompt is read in pieces; transformers doesn't split prompts with images."""
    model, batch = generator(family, cell), prompt(family)
    if family == "llava":
        batch["input_ids"][batch["input_ids"] == IMAGE_TOKEN] = 5
        del batch["pixel_values"]
    assert_same(generate(model, batch, prefill_chunk_size=size), uncached(model, batch))


def repeating(family):
    """One prompt for the decoder, in which things are said twice."""
    batch, said = prompt(family, (6,)), random_ids(1, 6, seed=2)
    said = torch.cat([said, said[:, 1:], said[:, :3]], dim=1)
    if GENERATORS[family].encoder_decoder:
        return batch | {"decoder_input_ids": said}
    ids = torch.cat([batch["input_ids"], said], dim=1)
    return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@EVERY_MODEL
def test_prompt_lookup(family, cell):
    """Drafts are copied from the prompt; what follows the first wrong token is taken back."""
    model, batch = generator(family, cell), repeating(family)
    options = {"max_new_tokens": 12}
    assert_same(generate(model, batch, **options, prompt_lookup_num_tokens=3), uncached(model, batch, **options))


def assistant_of(family, cell):
    """A model with an adapter of its own, near enough to the other one for some of its drafts to be taken, not all."""
    if family in ("gemma3", "mistral") and parse(transformers.__version__) < parse("5.23"):
        pytest.skip("there transformers' assisted decoding fails where attention windows slide, without READ as well")
    model, noise = generator(family, cell), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2 * parameter.std())
    model = model.get_base_model()
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens = 3
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


@EVERY_MODEL
def test_assisted_decoding(family, cell):
    """Drafts come from another model, whose cache is taken back as well."""
    model, batch, options = generator(family, cell), repeating(family), {"max_new_tokens": 12}
    assisted = generate(model, batch, **options, assistant_model=assistant_of(family, cell))
    assert_same(assisted, uncached(model, batch, **options))


@EVERY_DECODER
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_one_cache_over_two_calls(family, cell, static):
    """A conversation: the answer and the next question are added to the cache of the first call."""
    model, batch = generator(family, cell), prompt(family)
    cache = empty_cache(family, model, size=40 if static else None)
    first = generate(model, batch, **{CACHE: cache})
    assert_same(first, uncached(model, batch))
    question = random_ids(len(PROMPTS), 5, seed=1)
    more = torch.ones(len(PROMPTS), NEW_TOKENS + 5, dtype=torch.long)
    second = batch | {
        "input_ids": torch.cat([first.sequences, question], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], more], dim=1),
    }
    expected = uncached(model, second)
    second.pop("pixel_values", None)  # they are in the cache
    assert_same(generate(model, second, **{CACHE: cache}), expected)
