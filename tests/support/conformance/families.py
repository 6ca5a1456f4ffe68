"""The families that READ is checked on: a tiny random model of each, its inputs, and what it is known to do."""

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from .inputs import PLACEHOLDER, START
from .shrink import PATCH, WIDTH, shrink


BOTH = ("left", "right")
RIGHT = ("right",)
ABSOLUTE = "the base model counts positions from the start of the padding"
WAVEFORM = "the base model takes the padding of a sound to be on the right; with `feat_extract_norm='layer'`"
LOCAL = "no padding: the base model's convolutions look over the end of the sequence"
SOUND = "only the text is padded: the base model's convolutions look over the end of a shorter sound"


@dataclass(frozen=True)
class Fault:
    """What old releases of transformers get wrong in a base model, READ or not.

    The checks that it breaks mend it first, to see READ's part.

    Attributes:
        fixed_in: the first release without it.
        what: what the model does before.
        check: one that the base model itself fails then, a key of `checks.CHECKS`.
        mend: changes such a model, in place, to do what it does in newer releases.
    """

    fixed_in: str
    what: str
    check: str
    mend: Callable[[Any], None]

    @property
    def is_here(self) -> bool:
        return Version(transformers.__version__) < Version(self.fixed_in)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model: name of the model class in transformers.
        inputs: what it is given, a key of `inputs.INPUTS`.
        targets: how many modules READ adapts by default.
        paddings: sides on which padding leaves the base model's own valid tokens alone; None if it takes no padding.
        generates: None if it doesn't; else what the cached generation is compared with: `"generate"` without a cache,
            or one `"forward"` over what was generated.
        changes: what the tiny configuration has other than `shrink` makes it, by dotted path.
        reason: why a side is missing in `paddings`, or a check is left out.
        fault: what is wrong with the base model in old releases of transformers.
    """

    model: str
    inputs: str
    targets: int
    paddings: tuple[str, ...] | None = None
    generates: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    fault: Fault | None = None

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.model)


def encoder(model: str, targets: int = 2, paddings: tuple[str, ...] = BOTH, **options: Any) -> Family:
    return Family(model, "text", targets, paddings, **options)


def decoder(model: str, targets: int = 2, paddings: tuple[str, ...] = BOTH, **options: Any) -> Family:
    return Family(model, "text", targets, paddings, **{"generates": "generate"} | options)


def seq2seq(model: str, targets: int = 4, paddings: tuple[str, ...] = RIGHT, **options: Any) -> Family:
    return Family(
        model,
        "text2text",
        targets,
        paddings,
        **{"generates": "generate", "reason": "" if paddings == BOTH else ABSOLUTE} | options,
    )


def image(model: str, targets: int = 2, **options: Any) -> Family:
    return Family(model, "image", targets, **options)


def video(model: str, targets: int = 2, **options: Any) -> Family:
    return Family(model, "video", targets, **options)


def waveform(model: str, targets: int = 2, paddings: tuple[str, ...] = RIGHT, **options: Any) -> Family:
    changes = {
        "conv_dim": [WIDTH] * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer",  # which unlike the other kind has no statistics over the padding
    }
    return Family(model, "waveform", targets, paddings, **{"changes": changes, "reason": WAVEFORM} | options)


def image_text(model: str, inputs: str = "image_text", targets: int = 2, **options: Any) -> Family:
    placeholders = {"image_token_id": PLACEHOLDER} if "video" not in inputs else {"video_token_id": PLACEHOLDER}
    changes = placeholders | options.pop("changes", {})
    return Family(model, inputs, targets, **{"paddings": BOTH, "generates": "generate", "changes": changes} | options)


def _mend_umt5(model: Any) -> None:
    for block in model.decoder.block:
        block.layer[0].SelfAttention.is_causal = True


def _mend_paligemma(model: Any) -> None:
    def update(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        updated = type(self)._update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs)
        updated["token_type_ids"][:, -1] = 1  # what follows the prompt; the released method repeats its last type
        return updated

    model._update_model_kwargs_for_generation = types.MethodType(update, model)


UMT5 = Fault("5.18", "the decoder sees later tokens where nothing is padded", "padding", _mend_umt5)
PALIGEMMA = Fault(
    "5.18", "without a cache, what was generated sees later tokens, as a prompt does", "generation", _mend_paligemma
)

# Three axes of rotary positions, which share a head.
MROPE = {
    "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "vision_start_token_id": START,
}

FAMILIES: dict[str, Family] = {
    # Text encoders
    "bert": encoder("BertModel"),
    "roberta": encoder("RobertaModel"),
    "deberta-v2": encoder("DebertaV2Model"),
    "distilbert": encoder("DistilBertModel"),
    "electra": encoder("ElectraModel"),
    "albert": encoder("AlbertModel", targets=1),
    "modernbert": encoder("ModernBertModel"),
    "mpnet": encoder("MPNetModel"),
    "xlm-roberta": encoder("XLMRobertaModel"),
    "longformer": encoder("LongformerModel", changes={"attention_window": 8}),
    "big_bird": encoder("BigBirdModel"),
    "roformer": encoder("RoFormerModel"),
    "rembert": encoder("RemBertModel"),
    "megatron-bert": encoder("MegatronBertModel"),
    "mobilebert": encoder("MobileBertModel"),
    "convbert": encoder("ConvBertModel", paddings=(), reason=LOCAL),
    "layoutlm": encoder("LayoutLMModel"),
    "nomic_bert": encoder("NomicBertModel"),
    # Encoder-decoders
    "bart": seq2seq("BartForConditionalGeneration"),
    "mbart": seq2seq("MBartForConditionalGeneration"),
    "t5": seq2seq("T5ForConditionalGeneration", paddings=BOTH, changes={"decoder_start_token_id": 0}),
    "mt5": seq2seq("MT5ForConditionalGeneration", paddings=BOTH),
    "pegasus": seq2seq("PegasusForConditionalGeneration"),
    "marian": seq2seq("MarianMTModel"),
    "blenderbot": seq2seq("BlenderbotForConditionalGeneration"),
    "umt5": seq2seq("UMT5ForConditionalGeneration", paddings=BOTH, fault=UMT5),
    "longt5": seq2seq("LongT5ForConditionalGeneration", paddings=BOTH),
    "switch_transformers": seq2seq("SwitchTransformersForConditionalGeneration", paddings=BOTH),
    "m2m_100": seq2seq("M2M100ForConditionalGeneration", paddings=BOTH),
    "nllb-moe": seq2seq("NllbMoeForConditionalGeneration", paddings=BOTH),
    "led": seq2seq("LEDForConditionalGeneration", changes={"attention_window": 8}),
    "mvp": seq2seq("MvpForConditionalGeneration"),
    "plbart": seq2seq("PLBartForConditionalGeneration"),
    "bigbird_pegasus": seq2seq("BigBirdPegasusForConditionalGeneration"),
    # Decoders
    "llama": decoder("LlamaForCausalLM"),
    "mistral": decoder("MistralForCausalLM"),
    "mixtral": decoder("MixtralForCausalLM"),
    "qwen2": decoder("Qwen2ForCausalLM"),
    "qwen3": decoder("Qwen3ForCausalLM"),
    "qwen2_moe": decoder("Qwen2MoeForCausalLM"),
    "qwen3_moe": decoder("Qwen3MoeForCausalLM"),
    "gemma": decoder("GemmaForCausalLM"),
    "gemma2": decoder("Gemma2ForCausalLM"),
    "gemma3_text": decoder("Gemma3ForCausalLM"),
    "phi": decoder("PhiForCausalLM"),
    "phi3": decoder("Phi3ForCausalLM"),
    "gpt2": decoder("GPT2LMHeadModel"),
    "gpt_neo": decoder("GPTNeoForCausalLM", changes={"attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": decoder("GPTNeoXForCausalLM"),
    "gptj": decoder("GPTJForCausalLM", changes={"rotary_dim": 8}),
    "opt": decoder("OPTForCausalLM"),
    "bloom": decoder("BloomForCausalLM"),
    "falcon": decoder("FalconForCausalLM"),
    "olmo2": decoder("Olmo2ForCausalLM"),
    "cohere": decoder("CohereForCausalLM"),
    "stablelm": decoder("StableLmForCausalLM"),
    "starcoder2": decoder("Starcoder2ForCausalLM"),
    "granite": decoder("GraniteForCausalLM"),
    "smollm3": decoder("SmolLM3ForCausalLM"),
    "gpt_bigcode": decoder("GPTBigCodeForCausalLM"),
    "gpt_oss": decoder("GptOssForCausalLM"),
    "llama4_text": decoder("Llama4ForCausalLM"),
    "olmo3": decoder("Olmo3ForCausalLM"),
    "olmoe": decoder("OlmoeForCausalLM"),
    "glm4": decoder("Glm4ForCausalLM"),
    "glm4_moe": decoder("Glm4MoeForCausalLM"),
    "granitemoe": decoder("GraniteMoeForCausalLM"),
    "phimoe": decoder("PhimoeForCausalLM"),
    "persimmon": decoder("PersimmonForCausalLM"),
    "mpt": decoder("MptForCausalLM"),
    "xglm": decoder("XGLMForCausalLM"),
    "biogpt": decoder("BioGptForCausalLM"),
    "ernie4_5_moe": decoder("Ernie4_5_MoeForCausalLM"),
    "exaone4": decoder("Exaone4ForCausalLM"),
    "cohere2": decoder("Cohere2ForCausalLM"),
    "helium": decoder("HeliumForCausalLM"),
    "minimax": decoder("MiniMaxForCausalLM"),
    "lfm2": decoder("Lfm2ForCausalLM"),
    "qwen3_next": decoder("Qwen3NextForCausalLM"),
    # Images
    "vit": image("ViTModel"),
    "deit": image("DeiTModel"),
    "beit": image("BeitModel"),
    "swin": image(
        "SwinModel",
        changes={"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
    ),
    "dinov2": image("Dinov2Model"),
    "dinov2_with_registers": image("Dinov2WithRegistersModel"),
    "dinov3_vit": image("DINOv3ViTModel"),
    "vit_msn": image("ViTMSNModel"),
    "ijepa": image("IJepaModel"),
    "yolos": image("YolosModel"),
    # Dual encoders
    "clip": Family("CLIPModel", "dual", 4, BOTH),
    "siglip": Family("SiglipModel", "dual", 4, BOTH),
    "xclip": Family("XCLIPModel", "dual_video", 6, BOTH),
    # Videos
    "videomae": video("VideoMAEModel"),
    "timesformer": video("TimesformerModel"),
    "vivit": video("VivitModel", changes={"tubelet_size": [2, PATCH, PATCH]}),
    # Sound
    "wav2vec2": waveform("Wav2Vec2Model"),
    "hubert": waveform("HubertModel"),
    "wavlm": waveform("WavLMModel"),
    "unispeech": waveform("UniSpeechModel"),
    "unispeech-sat": waveform("UniSpeechSatModel"),
    "wav2vec2-conformer": waveform("Wav2Vec2ConformerModel", paddings=(), reason=LOCAL),
    "audio-spectrogram-transformer": Family("ASTModel", "spectrogram", 2, changes={"max_length": 48}),
    "whisper": Family("WhisperForConditionalGeneration", "mel_speech", 4, RIGHT, "generate", reason=ABSOLUTE),
    "speech_to_text": Family("Speech2TextForConditionalGeneration", "speech", 4, BOTH, "generate", reason=SOUND),
    # Text with images or videos
    "blip-2": image_text(
        "Blip2ForConditionalGeneration",
        generates="forward",
        changes={"num_query_tokens": 4},
    ),
    "llava": image_text("LlavaForConditionalGeneration"),
    "llava_next_video": image_text("LlavaNextVideoForConditionalGeneration", "video_text"),
    "video_llava": image_text("VideoLlavaForConditionalGeneration", "long_video_text"),
    "qwen2_vl": image_text("Qwen2VLForConditionalGeneration", "packed_video_text", changes=MROPE),
    "qwen2_5_vl": image_text("Qwen2_5_VLForConditionalGeneration", "packed_video_text", changes=MROPE),
    "qwen2_5_omni_thinker": image_text(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "timed_video_text",
        changes=MROPE,
    ),
    "internvl": image_text("InternVLForConditionalGeneration", changes={"vision_config.patch_size": [8, 8]}),
    "smolvlm": image_text("SmolVLMForConditionalGeneration", "images_text", changes={"vision_config.patch_size": 8}),
    "idefics3": image_text("Idefics3ForConditionalGeneration", "images_text", changes={"vision_config.patch_size": 8}),
    "paligemma": image_text("PaliGemmaForConditionalGeneration", "typed_image_text", fault=PALIGEMMA),
    "gemma3": image_text("Gemma3ForConditionalGeneration", "typed_image_text", changes={"mm_tokens_per_image": 4}),
}


@functools.cache
def _prototype(family: str) -> nn.Module:
    known = FAMILIES[family]
    config = shrink(known.model_class.config_class(), known.changes)
    torch.manual_seed(0)
    # Frozen as an adapted model is: torch may pick another attention kernel, with other rounding, for gradients.
    return known.model_class(config).eval().requires_grad_(False)


def base_model(family: str, *, mended: bool = False) -> Any:
    """A fresh copy of the family's tiny model, frozen, in eval mode, always with the same weights.

    Args:
        family: its name.
        mended: without the family's fault, which an old release of transformers has.
    """
    model, fault = copy.deepcopy(_prototype(family)), FAMILIES[family].fault
    if mended and fault is not None and fault.is_here:
        fault.mend(model)
    return model
