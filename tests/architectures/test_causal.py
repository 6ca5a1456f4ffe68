"""Which models' tokens see only earlier ones, where configs and attention don't say it alike."""

import pytest
import torch
import transformers
from generators import CACHE
from helpers import strengthen, token_rows
from models import VOCAB
from peft import get_peft_model

from peft_read import ReadConfig
from peft_read.architectures.targets import is_causal


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
WIDE = SMALL | {"intermediate_size": 32}
SIDES = {
    f"{side}_{part}": value
    for side in ("encoder", "decoder")
    for part, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}
BART = SIDES | {"vocab_size": VOCAB, "d_model": 16}
EXPERTS = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
GENERATORS = {
    "Bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB},
    "GPTNeoXJapanese": WIDE,
    "Git": WIDE | {"vision_config": VISION | {"image_size": 8, "patch_size": 4}},
    "ImageGPT": GPT | {"vocab_size": VOCAB},
    "Llama": WIDE,
    "Mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": VOCAB},
    "OpenAIGPT": GPT | {"vocab_size": VOCAB},
    "Rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCAB, "attention_hidden_size": 16},
    "XGLM": {"d_model": 16, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2, "vocab_size": VOCAB},
    "XLM": {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": VOCAB, "causal": True},
    "BertGeneration": WIDE | {"is_decoder": True},
}
ENCODERS = {
    "Bert": WIDE,
    "BertGeneration": WIDE,
    "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": VOCAB},
    "EuroBert": WIDE | {"num_key_value_heads": 2} | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "XLM": {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": VOCAB},
}
# Encoders and decoders in one.
BOTH = {
    "BigBirdPegasus": BART | {"attention_type": "original_full"},
    "LED": BART | {"attention_window": 4},
    "Mvp": BART,
    "NllbMoe": BART | EXPERTS,
    "PegasusX": BART,
}


def base(name, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model_class = "BertGenerationEncoder" if name == "BertGeneration" else f"{name}Model"
    return getattr(transformers, model_class)(config).eval()


@torch.no_grad()
def sees_ahead(model):
    """Whether an earlier token changes with the last one."""
    ids = token_rows((8,))[0][None]
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % (VOCAB - 3) + 3
    states = [model(input_ids=given).last_hidden_state[:, :-1] for given in (ids, other)]
    return not torch.equal(*states)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name):
    """They don't see ahead, and READ takes them for what they are."""
    model = base(name, GENERATORS[name])
    assert not sees_ahead(model)
    assert is_causal(model)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    """They see ahead, of the same types in part."""
    model = base(name, ENCODERS[name])
    assert sees_ahead(model)
    assert not is_causal(model)


@pytest.mark.parametrize("name", BOTH)
def test_encoder_decoders(name):
    """One side of each."""
    model = base(name, BOTH[name])
    assert (is_causal(model.get_encoder()), is_causal(model.get_decoder())) == (False, True)


def test_decoders_of_no_words():
    """DETR's objects see each other."""
    size = {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"])
    config = transformers.DetrConfig(**size, d_model=16, use_timm_backbone=False, backbone_config=backbone)
    assert not is_causal(transformers.DetrModel(config).decoder)


@pytest.mark.parametrize("name", ["Bloom", "XGLM", "Git"])
@torch.no_grad()
def test_a_cache_of_its_own_goes_on(name):
    """A model that nobody passed a cache makes one: the state is beside it."""
    model = strengthen(get_peft_model(base(name, GENERATORS[name]), ReadConfig(r=4, cell="gru"))).eval()
    ids = token_rows((8,))[0][None]
    whole = model(input_ids=ids).last_hidden_state
    first = model(input_ids=ids[:, :5], use_cache=True)
    cache = next(value for value in first.values() if hasattr(value, "get_seq_length"))
    again = model(input_ids=ids[:, 5:], **{CACHE: cache}).last_hidden_state
    torch.testing.assert_close(again, whole[:, 5:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["Bloom", "Mpt"])
def test_both_ways_is_refused(name):
    """It would show each token its future."""
    with pytest.raises(ValueError, match="is in a decoder"):
        get_peft_model(base(name, GENERATORS[name]), ReadConfig(bidirectional=True))
