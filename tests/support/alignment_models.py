"""Tiny models that see video and text, adapted."""

import torch
from helpers import strengthen
from models import HEADS, IMAGE, LAYERS, PATCH, VOCAB, WIDE, WIDTH, bart_config, bert_config, clip_config, llama_config
from peft import get_peft_model
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    CLIPModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    XCLIPConfig,
    XCLIPModel,
)

from peft_read import (
    ReadConfig,
)


FRAMES = 4
VISUAL, VIDEO = VOCAB - 1, VOCAB - 2


TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "initializer_range": 0.2,
}


def adapt(model, seed=0, adapter_name="default", **options):
    """A strong adapter in a frozen model."""
    return strengthen(get_peft_model(model, ReadConfig(**{"r": 4} | options), adapter_name), seed, adapter_name)


def build(cls, config, **options):
    torch.manual_seed(0)
    return adapt(cls(config), **options)


def bert(labels=3, **options):
    return build(
        BertForSequenceClassification, bert_config(num_labels=labels), modules_to_save=["classifier"], **options
    )


def albert():
    config = AlbertConfig(
        embedding_size=WIDTH,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        num_labels=3,
        **TOWER,
    )
    return build(AlbertForSequenceClassification, config)


def bart():
    config = bart_config()
    config.forced_eos_token_id = None
    return build(BartForConditionalGeneration, config)


def llava():
    vision = CLIPVisionConfig(image_size=IMAGE, patch_size=PATCH, projection_dim=WIDTH, **TOWER)
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(), image_token_id=VISUAL, image_seq_length=4, pad_token_id=0
    )
    return build(LlavaForConditionalGeneration, config)


def qwen2_vl():
    text = TOWER | {
        "vocab_size": VOCAB,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "embed_dim": WIDTH,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=VISUAL, video_token_id=VIDEO)
    return build(Qwen2VLForConditionalGeneration, config)


def xclip():
    text = TOWER | {"vocab_size": VOCAB, "max_position_embeddings": 64}
    mit = {
        "mit_hidden_size": WIDTH,
        "mit_intermediate_size": WIDE,
        "mit_num_attention_heads": HEADS,
        "mit_num_hidden_layers": 1,
    }
    vision = TOWER | mit | {"image_size": IMAGE, "patch_size": PATCH, "num_frames": FRAMES}
    return build(
        XCLIPModel,
        XCLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, prompt_num_attention_heads=HEADS),
    )


def siglip():
    text = TOWER | {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    vision = TOWER | {"image_size": IMAGE, "patch_size": PATCH}
    return build(SiglipModel, SiglipConfig(text_config=text, vision_config=vision))


def clip():
    return build(CLIPModel, clip_config())
