"""Tiny checkpoints as they are published: whole models of which a tower is one part, by the name of that part."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from trimodal_families import (
    DECODER_SIZES,
    ENCODER_SIZES,
    FAMILIES,
    FRAMES,
    HEADS,
    IMAGE,
    MELS,
    PATCH,
    SIZES,
    TOKENS,
    VOCAB,
    WAVEFORM,
    WHISPER,
    WIDE,
    WIDTH,
)


@dataclass(frozen=True)
class Checkpoint:
    """A model as somebody saved it.

    Attributes:
        model: its class in transformers.
        config: makes its configuration.
        parts: by modality, where the tower lies in the model; "" for all of it.
        random: parts of that tower, by the beginning of their names, that a tower may do without: what the checkpoint
            doesn't have.
    """

    model: str
    config: Callable[[], Any]
    parts: dict[str, str]
    random: tuple[str, ...] = field(default=())


PICTURE = {"image_size": IMAGE, "patch_size": PATCH}
SMALL = SIZES | {"num_hidden_layers": 2}
TEXT = SMALL | TOKENS
DUAL = {"projection_dim": 8}
CLIP_VISION = SMALL | PICTURE | DUAL
LLAMA = TEXT | {"num_key_value_heads": HEADS}
CLAP_AUDIO = FAMILIES["clap_audio"].config | DUAL


def sub(name: str, **options: Any) -> dict[str, Any]:
    """A configuration inside of another one."""
    return {"model_type": name} | options


def made(name: str, **options: Any) -> Callable[[], Any]:
    """Makes a configuration, by the name of its class."""
    return lambda: getattr(transformers, name)(**options)


def dual_encoder() -> Any:
    vision = transformers.ViTConfig(**SMALL, **PICTURE)
    text = transformers.BertConfig(**TEXT)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)


def encoder_decoder(name: str, encoder: Any) -> Any:
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    return getattr(transformers, name).from_encoder_decoder_configs(encoder, decoder)


def blip(name: str = "BlipConfig") -> Callable[[], Any]:
    return made(
        name,
        vision_config=CLIP_VISION,
        text_config=TEXT | {"encoder_hidden_size": WIDTH, "projection_dim": 8},
        projection_dim=8,
        image_text_hidden_size=8,
    )


def blip2() -> Any:
    qformer = TEXT | {"encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
    text = transformers.OPTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        ffn_dim=WIDE,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
    )
    return transformers.Blip2Config(
        vision_config=SMALL | PICTURE, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=2
    )


def speech(**options: Any) -> dict[str, Any]:
    return SMALL | WAVEFORM | {"vocab_size": VOCAB, "mask_time_prob": 0.05} | options


def family(name: str, **options: Any) -> dict[str, Any]:
    known = FAMILIES[name]
    return ({} if known.own_sizes else SIZES) | known.config | options


CLASSES = {"num_labels": 3}
T5 = family("t5", vocab_size=VOCAB)
BART = ENCODER_SIZES | DECODER_SIZES | TOKENS
CHECKPOINTS: dict[str, Checkpoint] = {
    # Two towers of different modalities.
    "clip": Checkpoint(
        "CLIPModel",
        made("CLIPConfig", vision_config=CLIP_VISION, text_config=TEXT | DUAL, **DUAL),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "siglip": Checkpoint(
        "SiglipModel",
        made("SiglipConfig", vision_config=SMALL | PICTURE, text_config=TEXT | {"projection_size": WIDTH}),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "clap": Checkpoint(
        "ClapModel",
        made("ClapConfig", audio_config=CLAP_AUDIO, text_config=TEXT | DUAL, **DUAL),
        {"audio": "audio_model", "text": "text_model"},
    ),
    "xclip": Checkpoint(
        "XCLIPModel",
        made(
            "XCLIPConfig",
            text_config=TEXT,
            vision_config=SMALL
            | PICTURE
            | {
                "num_frames": FRAMES,
                "mit_hidden_size": WIDTH,
                "mit_num_attention_heads": HEADS,
                "mit_num_hidden_layers": 1,
                "mit_intermediate_size": WIDE,
            },
            projection_dim=WIDTH,
            prompt_layers=1,
            prompt_num_attention_heads=HEADS,
        ),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "altclip": Checkpoint(
        "AltCLIPModel",
        made("AltCLIPConfig", vision_config=CLIP_VISION, text_config=TEXT | {"project_dim": WIDTH}, **DUAL),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "chinese_clip": Checkpoint(
        "ChineseCLIPModel",
        made("ChineseCLIPConfig", vision_config=CLIP_VISION, text_config=TEXT, **DUAL),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "metaclip2": Checkpoint(
        "MetaClip2Model",
        made("MetaClip2Config", vision_config=CLIP_VISION, text_config=TEXT | DUAL, **DUAL),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "aimv2": Checkpoint(
        "Aimv2Model",
        made("Aimv2Config", vision_config=SMALL | PICTURE, text_config=TEXT, **DUAL),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "dual_encoder": Checkpoint(
        "VisionTextDualEncoderModel", dual_encoder, {"vision": "vision_model", "text": "text_model"}
    ),
    "groupvit": Checkpoint(
        "GroupViTModel",
        made(
            "GroupViTConfig",
            vision_config={
                "hidden_size": WIDTH,
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "num_group_tokens": [4, 0],
                "num_output_groups": [4, 2],
                "num_attention_heads": HEADS,
                **PICTURE,
            },
            text_config=TEXT,
            projection_dim=8,
            projection_intermediate_dim=8,
        ),
        {"text": "text_model"},
    ),
    "owlvit": Checkpoint(
        "OwlViTModel",
        made("OwlViTConfig", vision_config=SMALL | PICTURE, text_config=TEXT, **DUAL),
        {"vision": "vision_model", "text": "text_model"},
    ),
    "blip": Checkpoint("BlipModel", blip(), {"vision": "vision_model", "text": "text_model"}),
    # Models that generate from what a tower saw or heard.
    "blip_captions": Checkpoint("BlipForConditionalGeneration", blip(), {"vision": "vision_model"}),
    "blip_retrieval": Checkpoint(
        "BlipForImageTextRetrieval", blip(), {"vision": "vision_model", "text": "text_encoder"}
    ),
    "blip2": Checkpoint("Blip2ForConditionalGeneration", blip2, {"vision": "vision_model"}),
    "llava": Checkpoint(
        "LlavaForConditionalGeneration",
        made(
            "LlavaConfig",
            vision_config=sub("clip_vision_model", **CLIP_VISION),
            text_config=sub("llama", **LLAMA),
            image_token_index=5,
        ),
        {"vision": "model.vision_tower", "text": "model.language_model"},
    ),
    "llava_siglip": Checkpoint(
        "LlavaForConditionalGeneration",
        made(
            "LlavaConfig",
            vision_config=sub("siglip_vision_model", **SMALL, **PICTURE),
            text_config=sub("llama", **LLAMA),
            image_token_index=5,
        ),
        {"vision": "model.vision_tower"},
    ),
    "git": Checkpoint(
        "GitForCausalLM", made("GitConfig", vision_config=SMALL | PICTURE, **TEXT), {"vision": "git.image_encoder"}
    ),
    "qwen2_audio": Checkpoint(
        "Qwen2AudioForConditionalGeneration",
        made(
            "Qwen2AudioConfig",
            audio_config=sub("qwen2_audio_encoder", **ENCODER_SIZES, num_mel_bins=MELS, max_source_positions=32),
            text_config=sub("qwen2", **LLAMA),
            audio_token_index=5,
        ),
        {"audio": "model.audio_tower", "text": "model.language_model"},
    ),
    "vision_encoder_decoder": Checkpoint(
        "VisionEncoderDecoderModel",
        lambda: encoder_decoder("VisionEncoderDecoderConfig", transformers.ViTConfig(**SMALL, **PICTURE)),
        {"vision": "encoder"},
    ),
    "speech_encoder_decoder": Checkpoint(
        "SpeechEncoderDecoderModel",
        lambda: encoder_decoder("SpeechEncoderDecoderConfig", transformers.Wav2Vec2Config(**speech())),
        {"audio": "encoder"},
    ),
    "whisper": Checkpoint(
        "WhisperForConditionalGeneration",
        made("WhisperConfig", **WHISPER, **ENCODER_SIZES, **DECODER_SIZES, bos_token_id=1, eos_token_id=2),
        {"audio": "model.encoder"},
    ),
    "moonshine": Checkpoint(
        "MoonshineForConditionalGeneration",
        made("MoonshineConfig", **family("moonshine")),
        {"audio": "model.encoder"},
    ),
    "t5": Checkpoint("T5ForConditionalGeneration", made("T5Config", **T5), {"text": "encoder"}),
    "mt5": Checkpoint("MT5ForConditionalGeneration", made("MT5Config", **T5), {"text": "encoder"}),
    "umt5": Checkpoint("UMT5ForConditionalGeneration", made("UMT5Config", **T5), {"text": "encoder"}),
    "bart": Checkpoint("BartForConditionalGeneration", made("BartConfig", **BART), {"text": "model.encoder"}),
    "mbart": Checkpoint("MBartForConditionalGeneration", made("MBartConfig", **BART), {"text": "model.encoder"}),
    "pegasus": Checkpoint("PegasusForConditionalGeneration", made("PegasusConfig", **BART), {"text": "model.encoder"}),
    # One tower with a head, as after pretraining or fine-tuning.
    "vit": Checkpoint(
        "ViTForImageClassification", made("ViTConfig", **SMALL, **PICTURE, **CLASSES), {"vision": "vit"}, ("pooler",)
    ),
    "deit": Checkpoint(
        "DeiTForImageClassification",
        made("DeiTConfig", **SMALL, **PICTURE, **CLASSES),
        {"vision": "deit"},
        ("pooler",),
    ),
    "beit": Checkpoint(
        "BeitForImageClassification", made("BeitConfig", **SMALL, **PICTURE, **CLASSES), {"vision": "beit"}
    ),
    "dinov2": Checkpoint(
        "Dinov2ForImageClassification", made("Dinov2Config", **SMALL, **PICTURE, **CLASSES), {"vision": "dinov2"}
    ),
    "swin": Checkpoint(
        "SwinForImageClassification", made("SwinConfig", **family("swin"), **CLASSES), {"vision": "swin"}
    ),
    "convnext": Checkpoint(
        "ConvNextForImageClassification",
        made("ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **CLASSES),
        {"vision": "convnext"},
    ),
    "resnet": Checkpoint(
        "ResNetForImageClassification",
        made("ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **CLASSES),
        {"vision": "resnet"},
    ),
    "videomae": Checkpoint(
        "VideoMAEForVideoClassification",
        made("VideoMAEConfig", **family("videomae"), **CLASSES),
        {"vision": "videomae"},
    ),
    "videomae_pretraining": Checkpoint(
        "VideoMAEForPreTraining",
        made(
            "VideoMAEConfig",
            **family("videomae"),
            decoder_hidden_size=WIDTH,
            decoder_num_attention_heads=HEADS,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=WIDE,
        ),
        {"vision": "videomae"},
    ),
    "timesformer": Checkpoint(
        "TimesformerForVideoClassification",
        made("TimesformerConfig", **family("timesformer"), **CLASSES),
        {"vision": "timesformer"},
    ),
    "vivit": Checkpoint(
        "VivitForVideoClassification",
        made("VivitConfig", **family("vivit"), **CLASSES),
        {"vision": "vivit"},
        ("pooler",),
    ),
    "vjepa2": Checkpoint(
        "VJEPA2ForVideoClassification", made("VJEPA2Config", **family("vjepa2"), **CLASSES), {"vision": "vjepa2"}
    ),
    "ast": Checkpoint(
        "ASTForAudioClassification",
        made("ASTConfig", **family("ast"), **CLASSES),
        {"audio": "audio_spectrogram_transformer"},
    ),
    "wav2vec2": Checkpoint("Wav2Vec2ForCTC", made("Wav2Vec2Config", **speech()), {"audio": "wav2vec2"}),
    "hubert": Checkpoint("HubertForCTC", made("HubertConfig", **speech()), {"audio": "hubert"}),
    "wavlm": Checkpoint("WavLMForCTC", made("WavLMConfig", **speech(num_buckets=32)), {"audio": "wavlm"}),
    "data2vec_audio": Checkpoint(
        "Data2VecAudioForCTC",
        made("Data2VecAudioConfig", **speech(num_conv_pos_embeddings=2, conv_pos_kernel_size=5)),
        {"audio": "data2vec_audio"},
    ),
    "bert": Checkpoint("BertForMaskedLM", made("BertConfig", **TEXT), {"text": "bert"}, ("pooler",)),
    "bert_pretraining": Checkpoint("BertForPreTraining", made("BertConfig", **TEXT), {"text": "bert"}),
    "roberta": Checkpoint("RobertaForMaskedLM", made("RobertaConfig", **TEXT), {"text": "roberta"}, ("pooler",)),
    "xlm_roberta": Checkpoint(
        "XLMRobertaForMaskedLM", made("XLMRobertaConfig", **TEXT), {"text": "roberta"}, ("pooler",)
    ),
    "mpnet": Checkpoint("MPNetForMaskedLM", made("MPNetConfig", **TEXT), {"text": "mpnet"}, ("pooler",)),
    "albert": Checkpoint(
        "AlbertForMaskedLM", made("AlbertConfig", **TEXT, embedding_size=16), {"text": "albert"}, ("pooler",)
    ),
    "electra": Checkpoint(
        "ElectraForPreTraining", made("ElectraConfig", **TEXT, embedding_size=16), {"text": "electra"}
    ),
    "deberta_v2": Checkpoint(
        "DebertaV2ForMaskedLM", made("DebertaV2Config", **family("deberta_v2")), {"text": "deberta"}
    ),
    "distilbert": Checkpoint(
        "DistilBertForMaskedLM", made("DistilBertConfig", **family("distilbert")), {"text": "distilbert"}
    ),
    "modernbert": Checkpoint(
        "ModernBertForMaskedLM", made("ModernBertConfig", **family("modernbert")), {"text": "model"}
    ),
    "gpt2": Checkpoint("GPT2LMHeadModel", made("GPT2Config", **family("gpt2")), {"text": "transformer"}),
    "llama": Checkpoint("LlamaForCausalLM", made("LlamaConfig", **LLAMA), {"text": "model"}),
}


@functools.cache
def checkpoint(name: str) -> transformers.PreTrainedModel:
    """The whole model, always with the same weights."""
    known = CHECKPOINTS[name]
    torch.manual_seed(0)
    model = getattr(transformers, known.model)(known.config()).eval()
    with torch.no_grad():  # biases and norms, too, aren't what a new model has
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
