"""`trainable_token_indices` and `ensure_weight_tying`: as with LoRA, for which PEFT has them."""

import pytest
import torch
from helpers import EXACT, token_rows
from lstta_models import composite, strengthen
from models import VOCAB, WIDTH
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_read import LsttaConfig, ReadConfig


IDS = token_rows((8,))[0][None]
TOKENS = [int(IDS[0, 1]), int(IDS[0, 5])]
OPTIONS = {"r": 4, "target_modules": ["down_proj"]}
METHODS = [pytest.param(ReadConfig, id="read"), pytest.param(LoraConfig, id="lora")]


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_trained_and_saved_beside_the_adapter(method, tied, tmp_path):
    """Those tokens and no others, at both ends where they are tied; they load exactly, and `unload` undoes them."""
    base = llama(tied)
    before = base.model.embed_tokens.weight.detach().clone()
    original = logits(base)
    model = get_peft_model(base, method(**OPTIONS, trainable_token_indices=TOKENS))
    torch.testing.assert_close(logits(model), original, **EXACT)
    train(model)
    merged = model.get_base_model().get_input_embeddings().weight
    changed = (merged != before).any(1).nonzero()[:, 0].tolist()
    assert changed == sorted(TOKENS)
    if tied:
        torch.testing.assert_close(model.get_base_model().lm_head.weight, merged, **EXACT)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    tokens = {key: tuple(value.shape) for key, value in keys.items() if "embed" in key or "lm_head" in key}
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert tokens == {name: (2, WIDTH)}
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)
    torch.testing.assert_close(logits(loaded.unload()), original, **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_stay_tied(method, tmp_path):
    """Embeddings that are trained as a whole take the head along, and are saved once."""
    config = method(**OPTIONS, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(True), config)
    train(model)
    trained = model.get_base_model().get_input_embeddings().modules_to_save["default"].weight
    assert model.get_base_model().lm_head.modules_to_save["default"].weight is trained
    assert not torch.equal(trained, llama(True).model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(True), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)


def test_tokens_beside_lstta(tmp_path):
    """The text tower's, by the name of its embeddings."""
    config = LsttaConfig(r=8, num_heads=2, trainable_token_indices={"word_embeddings": [5, 9]})
    model = strengthen(get_peft_model(composite(), config))
    tokens = model.get_base_model().text_model.embeddings.word_embeddings
    with torch.no_grad():
        tokens.token_adapter.trainable_tokens_delta["default"].mul_(2)
    assert tokens.token_adapter.trainable_tokens_delta["default"].requires_grad
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(composite(), tmp_path)
    got, wanted = loaded.state_dict(), model.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [VOCAB]}, rf"names the token {VOCAB}, but there are {VOCAB}"),
        ({"trainable_token_indices": {"embed_tokens": [VOCAB]}}, rf"names the token {VOCAB}, but there are {VOCAB}"),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, "READ can't adapt embeddings"),
    ],
)
def test_what_can_not_be_trained_is_refused(options, message):
    """And the model is as it was."""
    base = llama(True)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ReadConfig(**OPTIONS | options))
    assert not hasattr(base, "peft_config")
