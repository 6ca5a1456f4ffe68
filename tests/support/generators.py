"""Tiny models that generate, one per kind of decoder, and what the tests of generation do with them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from helpers import padding_mask, strengthen, token_rows
from models import HEADS, IMAGE, INIT_RANGE, LAYERS, PATCH, VOCAB, WIDE, WIDTH, bart_config, base_model, t5_config
from packaging.version import parse
from peft import get_peft_model
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    CLIPVisionConfig,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GenerationMixin,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from peft_read import ReadConfig


# How transformers calls a KV cache, in arguments and in outputs.
CACHE = "cache" if parse(transformers.__version__) >= parse("5.24") else "past_key_values"
# Less than the tokens of every test, so that the window moves.
WINDOW = 4
PROMPTS = (9, 5, 1)
NEW_TOKENS = 8
IMAGE_TOKEN, PATCHES = VOCAB - 1, (IMAGE // PATCH) ** 2
OPTIONS = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "disable_compile": True,
}
# Of logits between -10 and 10. Equal tokens say little: with a wrong state they often stay equal.
ERROR = {"rtol": 0, "atol": 1e-5}
# What a missing mechanism has to change at least.
VISIBLE = 1e-3

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": INIT_RANGE,
    "pad_token_id": 0,
}


def gemma3():
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**DECODER | layers, head_dim=8, sliding_window=WINDOW))


def opt():
    size = {"ffn_dim": WIDE, "word_embed_proj_dim": WIDTH, "init_std": INIT_RANGE, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**DECODER | size))


class PlainWhisper(WhisperForConditionalGeneration):
    """Whisper as any encoder-decoder: its own `generate` goes through long recordings piece by piece."""

    generate = GenerationMixin.generate


def whisper(model_cls=PlainWhisper):
    size = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "init_std": INIT_RANGE}
    size |= {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
    size |= {f"{side}_ffn_dim": WIDE for side in ("encoder", "decoder")}
    size |= {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return model_cls(WhisperConfig(vocab_size=VOCAB, **size, **special))


def llava():
    vision = {"hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "image_size": IMAGE}
    vision |= {"num_attention_heads": HEADS, "patch_size": PATCH, "initializer_range": INIT_RANGE}
    text = base_model("llama").config
    parts = {"vision_config": CLIPVisionConfig(**vision), "text_config": text, "vision_feature_layer": -1}
    return LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_id=IMAGE_TOKEN))


def text_prompt(lengths, padding="left"):
    """Padded prompts of these lengths."""
    mask = padding_mask(lengths, padding, max(lengths))
    ids = torch.full(mask.shape, 7)  # padding holds a token like any other: only the mask tells
    for row, places, tokens in zip(ids, mask, token_rows(lengths), strict=True):
        row[places] = tokens
    return {"input_ids": ids, "attention_mask": mask.long()}


def image_prompt(lengths):
    """Each prompt begins with an image."""
    text, batch = text_prompt(lengths), text_prompt([length + PATCHES for length in lengths])
    for row in range(len(lengths)):
        tokens = text["input_ids"][row][text["attention_mask"][row].bool()]
        start = int((1 - batch["attention_mask"][row]).sum())
        batch["input_ids"][row, start : start + PATCHES] = IMAGE_TOKEN
        batch["input_ids"][row, start + PATCHES :] = tokens
    pixels = torch.randn(len(lengths), 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    return batch | {"pixel_values": pixels}


def speech_prompt(lengths):
    return {"input_features": torch.randn(len(lengths), 8, 20, generator=torch.Generator().manual_seed(2))}


@dataclass(frozen=True)
class Generator:
    """How to build a model that generates, and what it continues.

    Attributes:
        targets: pattern of the modules to adapt.
        prompt: makes a padded batch of prompts of given lengths.
    """

    build: Callable[[], nn.Module]
    targets: str
    prompt: Callable = text_prompt
    encoder_decoder: bool = False


GENERATORS = {
    "llama": Generator(lambda: base_model("llama"), r".*mlp\.down_proj"),
    "qwen3": Generator(lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8)), r".*mlp\.down_proj"),
    "gemma3": Generator(gemma3, r".*mlp\.down_proj"),
    "gpt2": Generator(lambda: base_model("gpt2"), r".*mlp\.c_proj"),
    "opt": Generator(opt, r".*fc2"),
    "mistral": Generator(
        lambda: MistralForCausalLM(MistralConfig(**DECODER, sliding_window=WINDOW)), r".*mlp\.down_proj"
    ),
    "mixtral": Generator(
        lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=3)), r".*layers\.\d+\.mlp"
    ),
    "llava": Generator(llava, r".*language_model.*mlp\.down_proj", image_prompt),
    "bart": Generator(
        lambda: BartForConditionalGeneration(bart_config()),
        r".*fc2",
        functools.partial(text_prompt, padding="right"),  # its encoder counts positions from there
        encoder_decoder=True,
    ),
    "t5": Generator(lambda: T5ForConditionalGeneration(t5_config()), r".*\.wo", encoder_decoder=True),
    "whisper": Generator(whisper, r".*fc2", speech_prompt, encoder_decoder=True),
}
DECODERS = [family for family, known in GENERATORS.items() if not known.encoder_decoder]


def generator(family, cell="gru", seed=0, adapter_name="default"):
    """The family's tiny model with a strong adapter."""
    known = GENERATORS[family]
    torch.manual_seed(0)
    model = known.build().eval().requires_grad_(False)
    if family == "t5":
        model = model.double()  # its logits have errors of 1e-5 in themselves
    start = getattr(model.config, "decoder_start_token_id", None)
    # No end of sequence: all rows and all modes make as many tokens.
    images = [IMAGE_TOKEN] if family == "llava" else None
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start, suppress_tokens=images)
    model = get_peft_model(model, ReadConfig(r=4, cell=cell, target_modules=known.targets), adapter_name)
    return strengthen(model, seed, adapter_name).eval()


def prompt(family, lengths=PROMPTS):
    """A batch of prompts, padded but for speech."""
    return GENERATORS[family].prompt(lengths)


@torch.no_grad()
def generate(model, batch, **options):
    """What `generate` gives, always with the same random numbers."""
    torch.manual_seed(0)
    return model.generate(**batch, **OPTIONS | options)


def assert_same(actual, expected):
    """The same tokens from the same logits."""
    assert len(actual.logits) == len(expected.logits) > 0
    for step, (mine, other) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        torch.testing.assert_close(mine, other, **ERROR, msg=lambda text, step=step: f"step {step}: {text}")
    assert torch.equal(actual.sequences, expected.sequences)


def difference(actual, expected):
    """The largest difference between the logits of two generations."""
    pairs = zip(actual.logits, expected.logits, strict=True)
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def random_ids(rows, time, seed=0):
    """`(rows, time)` token ids, none of them special."""
    return torch.randint(3, VOCAB - 1, (rows, time), generator=torch.Generator().manual_seed(seed))


def step(family, model, ids, cache=None, **options):
    """One forward over tokens of the decoder, as somebody's own loop calls it."""
    if not GENERATORS[family].encoder_decoder:
        return model(input_ids=ids, **{CACHE: cache}, **options)
    with torch.no_grad():
        source = GENERATORS[family].prompt((5,))
        encoded = model.get_base_model().get_encoder()(**source).last_hidden_state
    encoded = BaseModelOutput(last_hidden_state=encoded.expand(len(ids), -1, -1))
    return model(encoder_outputs=encoded, decoder_input_ids=ids, **{CACHE: cache}, **options)


def empty_cache(family, model, size=None, goes_back=False):
    """A cache that grows, or one of fixed size.

    Args:
        size: the fixed size.
        goes_back: whether it can, also where its attention windows slide; then `crop` must follow every forward.
    """
    config = model.get_base_model().config
    cache = DynamicCache(config=config) if size is None else StaticCache(config=config, max_cache_len=size)
    if goes_back:
        cache.activate_past_recording()
    return EncoderDecoderCache(cache, DynamicCache()) if GENERATORS[family].encoder_decoder else cache
