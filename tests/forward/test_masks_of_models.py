"""Models whose masks take odd ways: READ adds no dependence on padding to what the base model has of it."""

import pytest
import torch
from helpers import hide_masks, padding_mask, strengthen, token_rows
from models import HEADS, VOCAB, WIDE, WIDTH
from peft import get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    HubertConfig,
    HubertModel,
    LEDConfig,
    LEDModel,
    LongformerConfig,
    LongformerModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from peft_read import ReadConfig


LENGTHS = (7, 4, 1)
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def longformer():
    return LongformerModel(LongformerConfig(**SIZE, **NO_DROPOUT, attention_window=4, max_position_embeddings=64))


def led():
    sides = {
        f"{side}_{part}": value
        for side in ("encoder", "decoder")
        for part, value in (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", WIDE))
    }
    return LEDModel(LEDConfig(vocab_size=VOCAB, d_model=WIDTH, **sides, attention_window=4, init_std=0.2)).encoder


def gemma3():
    text = SIZE | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    vision = SIZE | {"image_size": 8, "patch_size": 4}
    del vision["vocab_size"], vision["initializer_range"]
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))


def speech(config_cls, model_cls):
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    config = config_cls(**SIZE, **convolutions, **positions, **norm, apply_spec_augment=False)
    return model_cls(config)


def siglip2():
    size = SIZE | {"num_patches": 16, "patch_size": 4, "vision_use_head": False}
    del size["vocab_size"], size["initializer_range"]
    return Siglip2VisionModel(Siglip2VisionConfig(**size))


def text(padding):
    def worst(model):
        mask, rows = padding_mask(LENGTHS, padding, max(LENGTHS)), token_rows(LENGTHS)
        ids = torch.ones_like(mask, dtype=torch.long)  # Longformer counts positions by what isn't this
        for row, places, tokens in zip(ids, mask, rows, strict=True):
            row[places] = tokens
        together = states(model, input_ids=ids, attention_mask=mask.long())
        return max(
            distance(together[row][mask[row]], states(model, input_ids=tokens[None])[0])
            for row, tokens in enumerate(rows)
        )

    return worst


def speech_of_two_lengths(model):
    waves = torch.randn(2, 160, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 160, dtype=torch.long)
    mask[1, 90:] = 0
    alone = states(model, input_values=waves[1:, :90])[0]
    together = states(model, input_values=waves * mask, attention_mask=mask)
    return distance(together[1, : len(alone)], alone)


def images_of_two_sizes(model):
    mask, shapes = torch.ones(2, 9, dtype=torch.long), torch.tensor([[3, 3], [2, 2]])
    mask[1, 4:] = 0
    batch = {
        "pixel_values": torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }
    alone = {
        name: value[1:, :4] if value.ndim > 2 or name.endswith("mask") else value[1:] for name, value in batch.items()
    }
    return distance(states(model, **batch)[1, :4], states(model, **alone)[0])


def distance(actual, expected):
    return float((actual - expected).abs().max())


def states(model, **batch):
    output = model(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


CASES = {
    # Masks inside are additive floats, and the blocks see the tokens padded to whole windows.
    "longformer-left": (longformer, r".*layer\.\d+\.output\.dense", text("left"), {}),
    "longformer-right": (longformer, r".*layer\.\d+\.output\.dense", text("right"), {"bidirectional": True}),
    "led": (led, r".*fc2", text("right"), {"bidirectional": True}),
    # The language tower is given a dict of masks of pairs.
    "gemma3": (gemma3, r".*language_model.*mlp\.down_proj", text("left"), {}),
    # The mask that the encoder makes is at the rate of its frames.
    "wav2vec2": (
        lambda: speech(Wav2Vec2Config, Wav2Vec2Model),
        r".*output_dense",
        speech_of_two_lengths,
        {"bidirectional": True},
    ),
    "hubert": (
        lambda: speech(HubertConfig, HubertModel),
        r".*output_dense",
        speech_of_two_lengths,
        {"bidirectional": True},
    ),
    # Patches have a mask of another name.
    "siglip2": (siglip2, r".*mlp\.fc2", images_of_two_sizes, {"bidirectional": True}),
}


def base_and_adapted(case):
    build, targets, _, options = CASES[case]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build().eval().requires_grad_(False))
    config = ReadConfig(r=4, cell="gru", target_modules=targets, **options)
    return models[0], strengthen(get_peft_model(models[1], config)).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_padded_is_alone(case):
    """The valid tokens of a padded row are those of the row alone, as in the base model."""
    worst = CASES[case][2]
    for model in base_and_adapted(case):
        assert worst(model) < 2e-5


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_padding_would_show(case, monkeypatch):
    """With the mask kept from the adapter the test above fails by far."""
    _, model = base_and_adapted(case)
    hide_masks(monkeypatch)
    assert CASES[case][2](model) > 1e-2
