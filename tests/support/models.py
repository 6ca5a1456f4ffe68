"""Tiny random models of the families that the tests run on."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Model,
    ViTConfig,
    ViTModel,
)


VOCAB = 50
WIDTH = 32
WIDE = 64
LAYERS = 2
HEADS = 4
# Larger than the usual 0.02, so that tokens differ from each other in a random model.
INIT_RANGE = 0.2
PATCHES_PER_SIDE, PATCH = 2, 4
IMAGE = PATCHES_PER_SIDE * PATCH


def bert_config(**changes):
    return BertConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": WIDE,
            "max_position_embeddings": 64,
            "initializer_range": INIT_RANGE,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        | changes
    )


def bart_config():
    return BartConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=WIDE,
        decoder_ffn_dim=WIDE,
        max_position_embeddings=64,
        init_std=INIT_RANGE,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def t5_config():
    return T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=WIDE,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        initializer_factor=1.0,
        decoder_start_token_id=0,
    )


def llama_config(**changes):
    return LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": WIDE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 64,
            "initializer_range": INIT_RANGE,
            "pad_token_id": 0,
        }
        | changes
    )


def gpt2_config():
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        initializer_range=INIT_RANGE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def vit_config():
    return ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=WIDE,
        image_size=IMAGE,
        patch_size=PATCH,
        initializer_range=INIT_RANGE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def clip_config():
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
        "initializer_range": INIT_RANGE,
    }
    text = tower | {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": VOCAB - 1}
    vision = tower | {"image_size": IMAGE, "patch_size": PATCH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


@dataclass(frozen=True)
class Family:
    """A model family: how to build one, what it is given, what it gives, and what READ adapts in it by default.

    Attributes:
        text: whether it takes `input_ids`.
        images: whether it takes `pixel_values`.
        positions: whether it can be told each token's position, so that padding may stand anywhere.
        paddings: where padding leaves the base model's valid tokens alone.
        targets: literal names of the default targets.
        parts: the outputs that hold a state per token, by the kind of token.
    """

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    parts: dict[str, Callable]
    text: bool = True
    images: bool = False
    encoder_decoder: bool = False
    positions: bool = False
    paddings: tuple[str, ...] = ()


def per_layer(*patterns):
    return tuple(pattern.format(layer) for pattern in patterns for layer in range(LAYERS))


FAMILIES = {
    "bert": Family(
        lambda: BertModel(bert_config()),
        per_layer("encoder.layer.{}.output.dense"),
        {"text": lambda out: out.last_hidden_state},
        positions=True,
        paddings=("left", "right", "holes"),
    ),
    "bart": Family(
        lambda: BartModel(bart_config()),
        per_layer("encoder.layers.{}.fc2", "decoder.layers.{}.fc2"),
        {"encoder": lambda out: out.encoder_last_hidden_state, "decoder": lambda out: out.last_hidden_state},
        encoder_decoder=True,
        paddings=("right",),
    ),
    "t5_encoder": Family(
        lambda: T5EncoderModel(t5_config()),
        per_layer("encoder.block.{}.layer.1.DenseReluDense.wo"),
        {"text": lambda out: out.last_hidden_state},
        paddings=("left", "right"),
    ),
    "t5": Family(
        lambda: T5Model(t5_config()),
        per_layer("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"),
        {"encoder": lambda out: out.encoder_last_hidden_state, "decoder": lambda out: out.last_hidden_state},
        encoder_decoder=True,
        paddings=("left", "right"),
    ),
    "llama": Family(
        lambda: LlamaForCausalLM(llama_config()),
        per_layer("model.layers.{}.mlp.down_proj"),
        {"text": lambda out: out.logits},
        positions=True,
        paddings=("left", "right", "holes"),
    ),
    "gpt2": Family(
        lambda: GPT2LMHeadModel(gpt2_config()),
        per_layer("transformer.h.{}.mlp.c_proj"),
        {"text": lambda out: out.logits},
        positions=True,
        paddings=("left", "right", "holes"),
    ),
    "vit": Family(
        lambda: ViTModel(vit_config(), add_pooling_layer=False),
        per_layer("layers.{}.mlp.fc2"),
        {"image": lambda out: out.last_hidden_state},
        text=False,
        images=True,
    ),
    "clip": Family(
        lambda: CLIPModel(clip_config()),
        per_layer("text_model.encoder.layers.{}.mlp.fc2", "vision_model.encoder.layers.{}.mlp.fc2"),
        {
            "text": lambda out: out.text_model_output.last_hidden_state,
            "image": lambda out: out.vision_model_output.last_hidden_state,
        },
        images=True,
        positions=True,
        paddings=("left", "right", "holes"),
    ),
}


@functools.cache
def _prototype(family):
    torch.manual_seed(0)
    # Frozen as an adapted model is: torch may pick another attention kernel, with other rounding, for gradients.
    return FAMILIES[family].build().eval().requires_grad_(False)


def base_model(family):
    """A fresh copy of the family's tiny model, frozen, in eval mode, always with the same weights."""
    return copy.deepcopy(_prototype(family))


def classifier(labels=3):
    """A tiny BERT with a head to train beside the adapter."""
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(num_labels=labels)).eval()
