"""Towers that see other tokens than the model's mask is about, as many as it has: theirs is another, or none."""

import pytest
import torch
from helpers import strengthen
from models import HEADS, INIT_RANGE, VOCAB, WIDE, WIDTH
from peft import get_peft_model
from transformers import (
    BridgeTowerConfig,
    BridgeTowerModel,
    IdeficsConfig,
    IdeficsModel,
    LxmertConfig,
    LxmertModel,
    PerceiverConfig,
    PerceiverModel,
)
from transformers.models.perceiver.modeling_perceiver import PerceiverTextPreprocessor

from peft_read import ReadConfig


# As many words as the other tokens of the same model.
WORDS, SEEN = 5, 3
IDS = torch.tensor([[2, 7, 8, 9, 10]])
MASK = (torch.arange(WORDS) < SEEN).long()[None]
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def lxmert():
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1}
    return LxmertModel(LxmertConfig(**SIZE, **NO_DROPOUT, **layers, visual_feat_dim=8, initializer_range=INIT_RANGE))


def perceiver():
    size = {"num_latents": WORDS, "d_latents": WIDTH, "d_model": WIDTH, "num_blocks": 1}
    size |= {"num_self_attends_per_block": 2, "num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS}
    size |= {"vocab_size": VOCAB, "max_position_embeddings": 16, "initializer_range": INIT_RANGE}
    config = PerceiverConfig(**size, attention_probs_dropout_prob=0.0)
    return PerceiverModel(config, input_preprocessor=PerceiverTextPreprocessor(config))


def bridgetower():
    """Four patches and a class token."""
    width = {"hidden_size": 64, "num_hidden_layers": 2}
    text = SIZE | NO_DROPOUT | width | {"pad_token_id": 1}
    config = BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=HEADS,
        intermediate_size=WIDE,
        num_hidden_layers=2,
        text_config=text,
        vision_config=width | {"patch_size": 4, "image_size": 8},
    )
    return BridgeTowerModel(config)


def idefics():
    vision = {"embed_dim": WIDTH, "image_size": 8, "patch_size": 4, "num_attention_heads": HEADS}
    vision |= {"num_hidden_layers": 1, "intermediate_size": WIDE}
    resampler = {"use_resampler": False}
    config = IdeficsConfig(
        vocab_size=VOCAB,
        additional_vocab_size=0,
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        cross_layer_interval=1,
        vision_config=vision,
        perceiver_config=resampler,
        initializer_range=INIT_RANGE,
        pad_token_id=0,
    )
    return IdeficsModel(config)


def words(count, name="input_ids"):
    mask = MASK if count == WORDS else torch.ones(1, count, dtype=torch.long)
    return {name: IDS[:, :count], "attention_mask": mask}


# A model, its targets, its input with so many of the words, and what is to be compared: all that isn't padding.
CASES = {
    "lxmert": (
        lxmert,
        r".*(r_layers|visn_|lang_).*output\.dense|.*\.layer\.\d+\.output\.dense",
        lambda count: words(count) | {"visual_feats": randn(1, WORDS, 8), "visual_pos": randn(1, WORDS, 4)},
        lambda output: (output.vision_output, output.language_output[:, :SEEN]),
    ),
    "perceiver": (
        perceiver,
        r".*self_attends.*mlp\.dense2",
        lambda count: words(count, "inputs"),
        lambda output: (output.last_hidden_state,),
    ),
    "bridgetower": (
        bridgetower,
        r"cross_modal_(image|text)_layers\.\d+\.output\.dense",
        lambda count: words(count) | {"pixel_values": randn(1, 3, 8, 8)},
        lambda output: (output.image_features, output.text_features[:, :SEEN]),
    ),
    "idefics": (
        idefics,
        r"vision_model.*mlp\.fc2|layers\.\d+\.mlp\.down_proj",
        lambda count: (
            words(count)
            | {"pixel_values": randn(1, 1, 3, 8, 8), "image_attention_mask": torch.ones(1, count, 1, dtype=torch.long)}
        ),
        lambda output: (output.image_hidden_states, output.last_hidden_state[:, :SEEN]),
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_words_that_are_padding_hide_nothing_else(case):
    """Everything is as with the words alone, in the base model and in the adapted one, whose adapters change it."""
    build, targets, given, compared = CASES[case]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    outputs = []
    config = ReadConfig(r=4, cell="gru", bidirectional=case in ("lxmert", "perceiver"), target_modules=targets)
    for adapt in (lambda m: m, lambda m: strengthen(get_peft_model(m, config)).eval()):
        adapted = adapt(model)
        outputs.append(compared(adapted(**given(WORDS))))
        for padded, alone in zip(outputs[-1], compared(adapted(**given(SEEN))), strict=True):
            torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)
    for base, changed in zip(*outputs, strict=True):
        assert (changed - base).abs().amax(-1).min() > 1e-3


def test_a_mask_of_its_own():
    """LXMERT's boxes have one, and what is padding among them is as if it weren't there."""
    build, targets, given, _ = CASES["lxmert"]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    model = strengthen(get_peft_model(model, ReadConfig(r=4, bidirectional=True, target_modules=targets))).eval()
    batch = given(WORDS)
    with torch.no_grad():
        padded = model(**batch, visual_attention_mask=MASK).vision_output[:, :SEEN]
        boxes = {name: value[:, :SEEN] if name.startswith("visual") else value for name, value in batch.items()}
        torch.testing.assert_close(padded, model(**boxes).vision_output, rtol=0, atol=2e-5)
