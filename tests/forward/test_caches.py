"""Generation without a cache, and what of a model a cache has nothing to do with."""

import pytest
import torch
from generators import CACHE
from helpers import adapted, batch_of, states, strengthen
from models import VOCAB, bart_config, base_model, t5_config
from peft import get_peft_model
from transformers import BartForConditionalGeneration, DynamicCache, T5ForConditionalGeneration

from peft_read import ReadConfig


GENERATORS = {
    "bart": lambda: BartForConditionalGeneration(bart_config()),
    "t5": lambda: T5ForConditionalGeneration(t5_config()),
    "llama": lambda: base_model("llama"),
    "gpt2": lambda: base_model("gpt2"),
}
NEW_TOKENS = 5
OPTIONS = {
    "max_new_tokens": NEW_TOKENS,
    "min_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def generator(family, cell):
    torch.manual_seed(0)
    model = GENERATORS[family]().eval().requires_grad_(False)
    return strengthen(get_peft_model(model, ReadConfig(r=4, cell=cell))).eval()


def prompt(family):
    """Two padded prompts, on the left but for BART, whose encoder counts positions from there."""
    padding = "right" if family == "bart" else "left"
    batch = batch_of("llama", padding=padding, lengths=(6, 4))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", GENERATORS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_without_a_cache(family, num_beams):
    """Works for padded prompts, greedily and with beams: each row as if it were alone."""
    model, batch = generator(family, "gru"), prompt(family)
    options = OPTIONS | {"use_cache": False, "num_beams": num_beams, "output_logits": num_beams == 1}
    together = model.generate(**batch, **options)
    for row in range(2):
        keep = batch["attention_mask"][row].bool()
        alone = model.generate(**{name: value[row : row + 1, keep] for name, value in batch.items()}, **options)
        assert torch.equal(together.sequences[row, -NEW_TOKENS:], alone.sequences[0, -NEW_TOKENS:])
        for step, expected in zip(together.logits or (), alone.logits or (), strict=True):
            torch.testing.assert_close(step[row], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", GENERATORS)
def test_adapter_without_recurrence_uses_the_cache(family):
    """`cell='none'` has no state: cached generation gives the logits of uncached."""
    model, batch = generator(family, "none"), prompt(family)
    cached, uncached = (model.generate(**batch, **OPTIONS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for step, expected in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_cache_counts_however_it_is_passed():
    """By position and by keyword, with a head on the model and without."""
    model, ids = adapted("llama", cell="gru"), prompt("llama")["input_ids"][:, 2:]
    inner, more = model.get_base_model().model, ids[:, :2]
    whole = inner(input_ids=torch.cat([ids, more], dim=1), use_cache=False).last_hidden_state[:, -2:]
    for go_on in (
        lambda cache: inner(more, None, None, cache).last_hidden_state,
        lambda cache: inner(input_ids=more, **{CACHE: cache}).last_hidden_state,
        lambda cache: model(input_ids=more, **{CACHE: cache}, output_hidden_states=True).hidden_states[-1],
    ):
        cache = DynamicCache()
        model(input_ids=ids, **{CACHE: cache})
        torch.testing.assert_close(go_on(cache), whole, rtol=0, atol=1e-5)


def test_the_encoder_of_a_cached_decoder_may_recur():
    """Only the decoder continues a cache: an adapter in the encoder alone generates with one."""
    model = T5ForConditionalGeneration(t5_config()).eval().requires_grad_(False)
    config = ReadConfig(r=4, cell="gru", bidirectional=True, target_modules=r"encoder\..*DenseReluDense\.wo")
    model, batch = strengthen(get_peft_model(model, config)).eval(), prompt("t5")
    cached, uncached = (model.generate(**batch, **OPTIONS, use_cache=use_cache) for use_cache in (True, False))
    for step, expected in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)


def test_uncached_generation_is_the_full_forward():
    """Each step's logits are those of the forward over all tokens so far."""
    model, batch = generator("gpt2", "lstm"), prompt("gpt2")
    generated = model.generate(**batch, **OPTIONS, use_cache=False)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW_TOKENS, dtype=torch.long)], dim=1)
    full = {"input_ids": generated.sequences, "attention_mask": mask}
    logits = states("gpt2", model, full | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)})["text"]
    assert logits.shape[-1] == VOCAB
    for step, expected in zip(generated.logits, logits[:, -NEW_TOKENS - 1 : -1].unbind(1), strict=True):
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)
