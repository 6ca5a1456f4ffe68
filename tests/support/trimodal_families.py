"""Tiny random towers of the families that lockstep, the trimodal model and LSTTA are tested on, in one table."""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers


BATCH, FRAMES, IMAGE, PATCH = 2, 4, 32, 8
WIDTH, HEADS, WIDE, LAYERS = 32, 4, 64, 4
WORDS, VOCAB = 9, 100
SAMPLES, MELS, MEL_FRAMES = 2000, 16, 64


@dataclass(frozen=True)
class Family:
    """A tower.

    Attributes:
        modality: what it takes in.
        model: its class in transformers; after a dot, the part of it that is the tower.
        config: what its tiny configuration is made of, beside the sizes in `SIZES`.
        blocks: names of its blocks, in the order in which they run; `{}` counts through the layers.
        widths: of its blocks; one number for all.
        inputs: for sound, which inputs it takes, a key of `SOUNDS`.
        own_sizes: whether `config` has all sizes.
        checkpoints: whether it has gradient checkpointing.
    """

    modality: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ("layers.{}",)
    widths: tuple[int, ...] = (WIDTH,)
    inputs: str = "waveform"
    own_sizes: bool = False
    checkpoints: bool = True

    @property
    def block_names(self) -> list[str]:
        return [name.format(i) for name in self.blocks for i in range(LAYERS if "{}" in name else 1)]

    @property
    def block_widths(self) -> list[int]:
        return list(self.widths) * (len(self.block_names) // len(self.widths))


SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "initializer_range": 0.1,
}
ENCODER_SIZES = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDE,
    "init_std": 0.1,
}
DECODER_SIZES = {"decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": WIDE}
PICTURE = {"image_size": IMAGE, "patch_size": PATCH}
CLIP = PICTURE | {"num_frames": FRAMES}
TOKENS = {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WAVEFORM = {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 4),
    "num_feat_extract_layers": 3,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
WHISPER = {"num_mel_bins": MELS, "max_source_positions": MEL_FRAMES // 2, "vocab_size": VOCAB, "pad_token_id": 0}
STAGES = (
    "encoder.layers.0.blocks.0",
    "encoder.layers.0.blocks.1",
    "encoder.layers.1.blocks.0",
    "encoder.layers.1.blocks.1",
)


def vision(model: str, blocks: str | tuple[str, ...] = "layers.{}", **options: Any) -> Family:
    return Family("vision", model, blocks=(blocks,) if isinstance(blocks, str) else blocks, **options)


def swin(model: str) -> Family:
    config = {"image_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return vision(model, STAGES, config=config | {"window_size": 4}, widths=(16, 16, 32, 32), own_sizes=True)


def audio(model: str, blocks: str = "encoder.layers.{}", **options: Any) -> Family:
    return Family("audio", model, blocks=(blocks,), **options)


def waveform(model: str, **config: Any) -> Family:
    return audio(model, config=WAVEFORM | config)


def text(model: str, blocks: str | tuple[str, ...] = "encoder.layer.{}", **options: Any) -> Family:
    return Family("text", model, blocks=(blocks,) if isinstance(blocks, str) else blocks, **options)


FAMILIES = {
    "vit": vision("ViTModel", config=PICTURE),
    "deit": vision("DeiTModel", config=PICTURE),
    "beit": vision("BeitModel", config=PICTURE),
    "clip_vision": vision("CLIPVisionModel", "encoder.layers.{}", config=PICTURE),
    "siglip_vision": vision("SiglipVisionModel", "encoder.layers.{}", config=PICTURE),
    "dinov2": vision("Dinov2Model", "encoder.layer.{}", config=PICTURE),
    "dinov2_registers": vision("Dinov2WithRegistersModel", "encoder.layer.{}", config=PICTURE),
    "dinov3": vision("DINOv3ViTModel", "model.layer.{}", config=PICTURE),
    "ijepa": vision("IJepaModel", config=PICTURE),
    "swin": swin("SwinModel"),
    "swinv2": swin("Swinv2Model"),
    "xclip_vision": vision(
        "XCLIPVisionModel",
        "encoder.layers.{}",
        config=CLIP | {"mit_hidden_size": WIDTH, "mit_num_attention_heads": HEADS, "mit_num_hidden_layers": 1},
    ),
    "videomae": vision("VideoMAEModel", "encoder.layer.{}", config=CLIP | {"tubelet_size": 2}),
    "timesformer": vision("TimesformerModel", "encoder.layer.{}", config=CLIP),
    "vivit": vision(
        "VivitModel", config={"image_size": IMAGE, "num_frames": FRAMES, "tubelet_size": [2, PATCH, PATCH]}
    ),
    "vjepa2": vision(
        "VJEPA2Model",
        "encoder.layer.{}",
        config={
            "crop_size": IMAGE,
            "patch_size": PATCH,
            "frames_per_clip": FRAMES,
            "pred_hidden_size": WIDTH,
            "pred_num_attention_heads": HEADS,
            "pred_num_hidden_layers": 1,
        },
    ),
    "ast": audio(
        "ASTModel",
        "layers.{}",
        config={
            "max_length": MEL_FRAMES,
            "num_mel_bins": MELS,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 4,
        },
        inputs="spectrogram",
    ),
    "wav2vec2": waveform("Wav2Vec2Model"),
    "hubert": waveform("HubertModel"),
    "wavlm": waveform("WavLMModel", num_buckets=32, max_bucket_distance=64),
    "wavlm_stable": waveform("WavLMModel", num_buckets=32, max_bucket_distance=64, do_stable_layer_norm=True),
    "unispeech_sat": waveform("UniSpeechSatModel"),
    "wav2vec2_conformer": waveform("Wav2Vec2ConformerModel"),
    "data2vec_audio": waveform("Data2VecAudioModel", num_conv_pos_embeddings=2, conv_pos_kernel_size=5),
    "sew": waveform("SEWModel", squeeze_factor=2),
    "wav2vec2_bert": audio(
        "Wav2Vec2BertModel",
        config={
            "feature_projection_input_dim": MELS,
            "layerdrop": 0.0,
            "apply_spec_augment": False,
            "conv_depthwise_kernel_size": 5,
        },
        inputs="features",
    ),
    "whisper": audio(
        "WhisperModel.encoder",
        "layers.{}",
        config=WHISPER | ENCODER_SIZES | DECODER_SIZES,
        inputs="mels",
        own_sizes=True,
    ),
    "qwen2_audio": audio(
        "Qwen2AudioEncoder",
        "layers.{}",
        config=ENCODER_SIZES | {"num_mel_bins": MELS, "max_source_positions": MEL_FRAMES // 2},
        inputs="mels",
        own_sizes=True,
    ),
    "moonshine": audio(
        "MoonshineModel.encoder",
        "layers.{}",
        config={
            "encoder_num_hidden_layers": LAYERS,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": HEADS,
            "decoder_num_attention_heads": HEADS,
            "vocab_size": VOCAB,
        },
        inputs="long_waveform",
    ),
    "parakeet": audio(
        "ParakeetEncoder",
        "layers.{}",
        config={"num_mel_bins": MELS, "subsampling_conv_channels": 8, "conv_kernel_size": 5, "layerdrop": 0.0},
        inputs="features",
    ),
    "clap_audio": Family(
        "audio",
        "ClapAudioModel",
        {
            "window_size": 4,
            "num_mel_bins": MELS,
            "spec_size": 64,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "hidden_size": WIDTH,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
            "patch_embeds_hidden_size": 16,
            "num_hidden_layers": 2,
        },
        blocks=tuple(f"audio_encoder.{name.removeprefix('encoder.')}" for name in STAGES),
        widths=(16, 16, 32, 32),
        inputs="mel_image",
        own_sizes=True,
        checkpoints=False,
    ),
    "bert": text("BertModel", config=TOKENS),
    "roberta": text("RobertaModel", config=TOKENS),
    "xlm_roberta": text("XLMRobertaModel", config=TOKENS),
    "electra": text("ElectraModel", config=TOKENS | {"embedding_size": 16}),
    "mpnet": text("MPNetModel", config=TOKENS, checkpoints=False),
    "deberta": text("DebertaModel", config=TOKENS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta_v2": text(
        "DebertaV2Model",
        config=TOKENS
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "conv_kernel_size": 3,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "distilbert": text(
        "DistilBertModel",
        "transformer.layer.{}",
        config={"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": WIDE} | TOKENS,
        own_sizes=True,
    ),
    "modernbert": text(
        "ModernBertModel",
        "layers.{}",
        config=TOKENS | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "longformer": text("LongformerModel", config=TOKENS | {"attention_window": 4}),
    "nomic_bert": text("NomicBertModel", "layers.{}", config=TOKENS),
    "eurobert": text("EuroBertModel", "layers.{}", config=TOKENS),
    "albert": text(
        "AlbertModel",
        ("encoder.albert_layer_groups.0.albert_layers.0",) * LAYERS,
        config=TOKENS | {"embedding_size": 16},
        checkpoints=False,
    ),
    "funnel": text(
        "FunnelModel",
        ("encoder.blocks.0.0", "encoder.blocks.0.1", "encoder.blocks.1.0", "encoder.blocks.1.1"),
        config={
            "block_sizes": [2, 2],
            "d_model": WIDTH,
            "n_head": HEADS,
            "d_head": 8,
            "d_inner": WIDE,
            "vocab_size": VOCAB,
            "num_decoder_layers": 1,
        },
        own_sizes=True,
        checkpoints=False,
    ),
    "t5": text(
        "T5EncoderModel",
        "encoder.block.{}",
        config={
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": WIDE,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "vocab_size": VOCAB,
            "dropout_rate": 0.0,
        },
        own_sizes=True,
    ),
    "bart": text("BartModel.encoder", "layers.{}", config=ENCODER_SIZES | DECODER_SIZES | TOKENS, own_sizes=True),
    "clip_text": text("CLIPTextModel", "encoder.layers.{}", config=TOKENS),
    "siglip_text": text("SiglipTextModel", "encoder.layers.{}", config=TOKENS),
    "gpt2": text(
        "GPT2Model",
        "h.{}",
        config={"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB},
        own_sizes=True,
    ),
    "llama": text("LlamaModel", "layers.{}", config=TOKENS | {"num_key_value_heads": HEADS}),
    "qwen3": text("Qwen3Model", "layers.{}", config=TOKENS | {"num_key_value_heads": HEADS, "head_dim": 8}),
}
VISION, AUDIO, TEXT = (
    [name for name, family in FAMILIES.items() if family.modality == modality]
    for modality in ("vision", "audio", "text")
)
# Nothing random in a forward.
DROPOUT = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "drop_path_rate",
    "embd_pdrop",
    "feat_proj_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
)


@functools.cache
def _prototype(family: str) -> transformers.PreTrainedModel:
    known = FAMILIES[family]
    name, _, part = known.model.partition(".")
    model_class = getattr(transformers, name)
    config = model_class.config_class(**({} if known.own_sizes else SIZES) | known.config)
    for dropout in DROPOUT:
        if getattr(config, dropout, None):
            setattr(config, dropout, 0.0)
    torch.manual_seed(0)
    model = model_class(config)
    # Frozen as under an adapter is: torch may pick another attention kernel, with other rounding, for gradients.
    return (getattr(model, part) if part else model).eval().requires_grad_(False)


def tower(family: str) -> transformers.PreTrainedModel:
    """A fresh copy of a family's tiny tower, frozen, in eval mode, always with the same weights."""
    return copy.deepcopy(_prototype(family))


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frame_inputs(batch: int = BATCH, frames: int = FRAMES) -> dict[str, torch.Tensor]:
    return {"pixel_values": _random(batch, frames, 3, IMAGE, IMAGE, seed=1)}


SOUNDS = {
    "waveform": ("input_values", (SAMPLES,)),
    "long_waveform": ("input_values", (4 * SAMPLES,)),
    "spectrogram": ("input_values", (MEL_FRAMES, MELS)),
    "mels": ("input_features", (MELS, MEL_FRAMES)),
    "features": ("input_features", (MEL_FRAMES, MELS)),
    "mel_image": ("input_features", (1, 256, MELS)),
}


def sound_inputs(family: str, batch: int = BATCH) -> dict[str, torch.Tensor]:
    name, shape = SOUNDS[FAMILIES[family].inputs]
    return {name: _random(batch, *shape, seed=2)}


def text_inputs(batch: int = BATCH, words: int = WORDS) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCAB, (batch, words), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones(batch, words, dtype=torch.long)}


def tower_inputs(family: str) -> dict[str, torch.Tensor]:
    """What a family's tower itself is given: image towers take the frames of all videos as one batch."""
    known = FAMILIES[family]
    if known.modality == "audio":
        return sound_inputs(family)
    if known.modality == "text":
        return text_inputs()
    pixels = frame_inputs()["pixel_values"]
    if family == "vjepa2":
        return {"pixel_values_videos": pixels}
    return {"pixel_values": pixels if family in ("videomae", "timesformer", "vivit") else pixels.flatten(0, 1)}


def enable_checkpointing(model: transformers.PreTrainedModel, use_reentrant: bool) -> None:
    """Turn gradient checkpointing on, by the name that this version of transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
