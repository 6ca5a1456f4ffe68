"""Ways to generate in which READ's state can't follow: an error that says so, never a wrong answer."""

import copy

import pytest
import torch
from generators import (
    CACHE,
    DECODER,
    OPTIONS,
    assert_same,
    difference,
    empty_cache,
    generate,
    generator,
    prompt,
    random_ids,
    step,
    text_prompt,
    whisper,
)
from helpers import strengthen
from models import HEADS, VOCAB, WIDTH
from peft import get_peft_model
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    RwkvConfig,
    RwkvForCausalLM,
    WhisperForConditionalGeneration,
)

from peft_read import ReadConfig
from peft_read.forward.call import ForwardCall
from peft_read.forward.decoding import state_before


def adapt(model, targets):
    model = model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return strengthen(get_peft_model(model, ReadConfig(r=4, cell="gru", target_modules=targets))).eval()


def bamba():
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}
    return adapt(BambaForCausalLM(BambaConfig(**DECODER, **mamba, attn_layer_indices=[1])), r".*down_proj")


def qwen3_next(layers=("linear_attention", "full_attention")):
    linear = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    linear |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
    dense = {"num_experts": 0, "mlp_only_layers": [0, 1], "layer_types": list(layers), "head_dim": 8}
    return adapt(Qwen3NextForCausalLM(Qwen3NextConfig(**DECODER | linear | dense)), r".*mlp\.down_proj")


def mamba():
    size = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}
    return adapt(MambaForCausalLM(MambaConfig(**size)), r".*out_proj")


def rwkv():
    size = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "context_length": 64}
    return adapt(RwkvForCausalLM(RwkvConfig(**size)), r".*feed_forward\.value")


@pytest.mark.parametrize("model", [bamba, qwen3_next])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_linear_attention_beside_full_attention(model, options):
    """Such models' caches count their tokens: cached is uncached; going back is what transformers refuses there."""
    torch.manual_seed(0)
    model, batch = model(), text_prompt((9, 5, 1))
    cached, uncached = (generate(model, batch, **options, use_cache=use) for use in (True, False))
    assert difference(cached, uncached) < 1e-4  # as it is without READ
    assert torch.equal(cached.sequences, uncached.sequences)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, text_prompt((9,)), prompt_lookup_num_tokens=3)


def test_a_cache_that_does_not_count():
    """One of linear attention alone can't tell READ where it is; transformers' own masks stumble over it as well."""
    config = qwen3_next(("linear_attention", "linear_attention")).config
    given = {"input_ids": random_ids(2, 1), "past_key_values": DynamicCache(config=config)}
    call = ForwardCall.of(torch.nn.Identity(), given, causal=True)
    with pytest.raises(ValueError, match="holds tokens that it doesn't count"):
        state_before(call, "a recurrence", slice(None))


@pytest.mark.parametrize(
    ("model", "message"),
    [(mamba, "tokens that it doesn't count"), (rwkv, "`(state|cache)`")],
)
def test_states_of_other_kinds(model, message):
    """Models that carry earlier tokens' states in an argument of their own, or in a cache that doesn't count."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"{message}.*use_cache=False"):
        generate(model(), {"input_ids": random_ids(2, 6)})


@pytest.mark.parametrize("model", [mamba, rwkv])
def test_states_of_other_kinds_left_out(model):
    """What the error says to do works."""
    torch.manual_seed(0)
    model, ids = model(), random_ids(2, 6)
    generated = generate(model, {"input_ids": ids}, use_cache=False)
    with torch.no_grad():
        whole = model(input_ids=generated.sequences, use_cache=False).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), whole, rtol=0, atol=1e-5)


def test_a_tuple_of_keys_and_values():
    """Not a cache that anything could be laid beside."""
    keys = torch.randn(2, HEADS, 3, WIDTH // HEADS)
    call = ForwardCall.of(torch.nn.Identity(), {"past_key_values": ((keys, keys), (keys, keys))}, causal=True)
    with pytest.raises(ValueError, match="`past_key_values`"):
        state_before(call, "a recurrence", slice(None))


def test_a_cache_that_counts_nothing():
    """Reformer's keeps buckets; without it the model generates."""
    size = {"hidden_size": WIDTH, "num_attention_heads": 2, "attention_head_size": WIDTH // 2, "vocab_size": VOCAB}
    size |= {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (16, 16), "max_position_embeddings": 16}
    config = ReformerConfig(**size, attn_layers=["local"], is_decoder=True, local_attn_chunk_length=4)
    model = adapt(ReformerModelWithLMHead(config), r".*output\.dense")
    ids = random_ids(1, 8)
    assert model.generate(input_ids=ids, max_new_tokens=2, use_cache=False).shape == (1, 10)
    with pytest.raises(ValueError, match="holds tokens that it doesn't count"):
        model.generate(input_ids=ids, max_new_tokens=2)


@torch.no_grad()
def test_a_cache_whose_rows_were_changed_by_hand():
    """Beside its keys READ's states stay as they were: refused with the methods that change both."""
    model, ids = generator("llama"), random_ids(2, 6)
    cache = empty_cache("llama", model)
    step("llama", model, ids, cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"of 2 rows, the batch has 4\. .*`batch_repeat_interleave`"):
        step("llama", model, ids.repeat(2, 1)[:, :1], cache)


def test_continuous_batching():
    """`generate_batch` mixes requests in one row: it hands back READ's error instead of tokens."""
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0, eos_token_id=-1, do_sample=False)
    small = ContinuousBatchingConfig(num_blocks=2, max_batch_tokens=16, use_async_batching=False)
    requests = generator("llama").generate_batch(
        inputs=[[3, 4, 5], [6, 7, 8, 9]], generation_config=config, continuous_batching_config=small, warmup=False
    )
    for request in requests.values():
        assert request.generated_tokens == []
        assert "continuous batching" in request.error


def test_whisper_makes_another_cache():
    """Its own `generate` returns a cache built anew from keys and values, which READ's states aren't beside."""
    torch.manual_seed(0)
    model = whisper(WhisperForConditionalGeneration)
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=1, eos_token_id=2)
    model = strengthen(get_peft_model(model, ReadConfig(r=4, cell="gru", target_modules=r".*fc2"))).eval()
    options = OPTIONS | {"max_new_tokens": 6}
    cached, uncached = (model.generate(**prompt("whisper", (1,)), **options, use_cache=use) for use in (True, False))
    assert_same(cached, uncached)
    with pytest.raises(ValueError, match="can't continue from this cache"):
        step("whisper", model, random_ids(1, 2), getattr(cached, CACHE))


@torch.no_grad()
def test_an_error_leaves_model_and_cache_as_they_were():
    """After a refused step the model works on, with that cache too, once it is right again."""
    model, ids = generator("llama"), random_ids(2, 6)
    cache = empty_cache("llama", model)
    with model.disable_adapter():
        step("llama", model, ids, cache)
        twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="can't continue"):
        step("llama", model, ids, cache)
    fresh = step("llama", model, ids, use_cache=False).logits
    torch.testing.assert_close(step("llama", model, ids, DynamicCache()).logits, fresh, rtol=0, atol=1e-5)
    with model.disable_adapter():
        whole = step("llama", model, torch.cat([ids, ids], dim=1), use_cache=False).logits[:, 6:]
        torch.testing.assert_close(step("llama", model, ids, twin).logits, whole, rtol=0, atol=1e-5)
