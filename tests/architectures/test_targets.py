"""Which modules are found as targets, in every architecture: literal expectations and those that were measured.

All models are built on the meta device from the default configs of transformers, unless they have to run.
"""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from benchmarks.target_census import build, classes_of, measured_targets
from helpers import adapted
from models import FAMILIES, base_model
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralModel,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    SiglipVisionConfig,
    T5Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_read import ReadConfig, find_feed_forward_outputs
from peft_read.architectures.targets import default_targets


MEASURED = json.loads((Path(__file__).parent / "read_targets.json").read_text())
# Of the types whose parts had other names before.
RENAMED = {"qwen2_5_omni": "5.23.0", "qwen2_5_omni_thinker": "5.23.0"}
# What the defaults of some configs lack, or take a second for.
OPTIONS = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 2}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "videomae": {"num_frames": 2},
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = SMALL | {"num_key_value_heads": 2, "vocab_size": 20}
EXPERTS = TINY | {"num_local_experts": 2, "num_experts_per_tok": 1}

# Of the base model: targets, with N for their numbers, and how many; first those that are adapted by default.
LITERAL = {
    "bert": ({"encoder.layer.N.output.dense": 12}, {}),
    "bart": ({"encoder.layers.N.fc2": 12, "decoder.layers.N.fc2": 12}, {}),
    "t5": (
        {"encoder.block.N.layer.N.DenseReluDense.wo": 6, "decoder.block.N.layer.N.DenseReluDense.wo": 6},
        {},
    ),
    "llama": ({"layers.N.mlp.down_proj": 32}, {}),
    "gpt2": ({"h.N.mlp.c_proj": 12}, {}),
    "opt": ({"decoder.layers.N.fc2": 12}, {}),
    "mixtral": ({"layers.N.mlp": 32}, {}),
    "qwen2_moe": ({"layers.N.mlp": 24}, {}),
    "gemma3_text": ({"layers.N.mlp.down_proj": 26}, {}),
    "vit": ({"layers.N.mlp.fc2": 12}, {}),
    "swin": ({"encoder.layers.N.blocks.N.mlp.fc2": 12}, {}),
    "videomae": ({"encoder.layer.N.output.dense": 12}, {}),
    "vjepa2": ({"encoder.layer.N.mlp.fc2": 24}, {"predictor.layer.N.mlp.fc2": 12}),
    "whisper": ({"encoder.layers.N.fc2": 4, "decoder.layers.N.fc2": 4}, {}),
    "wav2vec2-conformer": ({"encoder.layers.N.ffn2.output_dense": 12}, {}),
    # Dual encoders: both sides, without the pooling heads.
    "clip": ({"text_model.encoder.layers.N.mlp.fc2": 12, "vision_model.encoder.layers.N.mlp.fc2": 12}, {}),
    "siglip": ({"text_model.encoder.layers.N.mlp.fc2": 12, "vision_model.encoder.layers.N.mlp.fc2": 12}, {}),
    "xclip": (
        {
            "text_model.encoder.layers.N.mlp.fc2": 12,
            "vision_model.encoder.layers.N.mlp.fc2": 12,
            "mit.encoder.layers.N.mlp.fc2": 1,
        },
        {"prompts_generator.decoder.N.mlp.N": 2},
    ),
    # Generative composites: the language tower.
    "gemma3": ({"language_model.layers.N.mlp.down_proj": 26}, {"vision_tower.encoder.layers.N.mlp.fc2": 12}),
    "qwen2_5_vl": ({"language_model.layers.N.mlp.down_proj": 80}, {"visual.blocks.N.mlp.down_proj": 32}),
    "llava": ({"language_model.layers.N.mlp.down_proj": 32}, {"vision_tower.encoder.layers.N.mlp.fc2": 24}),
    "blip-2": (
        {"language_model.model.decoder.layers.N.fc2": 12},
        {"vision_model.encoder.layers.N.mlp.fc2": 39, "qformer.encoder.layer.N.output_query.dense": 12},
    ),
    "florence2": (
        {"language_model.encoder.layers.N.fc2": 12, "language_model.decoder.layers.N.fc2": 12},
        {
            "vision_tower.blocks.N.N.spatial_block.ffn.fc2": 12,
            "vision_tower.blocks.N.N.channel_block.ffn.fc2": 12,
        },
    ),
    "phi4_multimodal": (
        {"layers.N.mlp.down_proj": 32},
        {
            "embed_tokens_extend.image_embed.img_processor.encoder.layers.N.mlp.fc2": 27,
            "embed_tokens_extend.audio_embed.encoder.encoders.N.feed_forward_out.down_proj": 24,
        },
    ),
    # An omni model's talker and vocoder are no targets.
    "qwen2_5_omni": (
        {"thinker.model.language_model.layers.N.mlp.down_proj": 28},
        {
            "thinker.model.audio_tower.layers.N.fc2": 32,
            "thinker.model.visual.blocks.N.mlp.down_proj": 32,
        },
    ),
    # One that finds what a text names in pictures: no language tower to prefer.
    "sam3": (
        {
            "vision_encoder.backbone.layers.N.mlp.fc2": 32,
            "text_encoder.text_model.encoder.layers.N.mlp.fc2": 24,
            "geometry_encoder.layers.N.mlp.fc2": 3,
            "detr_encoder.layers.N.mlp.fc2": 6,
            "detr_decoder.layers.N.mlp.fc2": 6,
        },
        {},
    ),
    # Neither attention nor a state space; what one of them calls its mixer is a convolution.
    "convnext": ({}, {}),
    "vibevoice_acoustic_tokenizer": ({}, {}),
}


@pytest.fixture(autouse=True)
def _quiet():
    """Default configs warn of much that doesn't matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_of(model_type):
    """A type's base model, or the model it has instead."""
    if Version(transformers.__version__) < Version(RENAMED.get(model_type, "0")):
        pytest.skip(f"has other names in transformers {transformers.__version__}")
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    classes = classes_of(model_type)
    if not classes:
        pytest.skip("a tower without a class of its own, tested in the models it is part of")
    model = build(classes[0], model_type, **OPTIONS.get(model_type, {}))
    if model is None:
        pytest.skip(f"transformers {transformers.__version__} can't build it from its default config")
    return model


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def outline(names):
    return Counter(re.sub(r"\b\d+\b", "N", name) for name in names)


@pytest.mark.parametrize("model_type", LITERAL)
def test_known_families(model_type):
    """All towers are found, and by default those are adapted through which video and text run."""
    default, others = LITERAL[model_type]
    model = base_of(model_type)
    found = find_feed_forward_outputs(model)
    assert outline(found) == default | others
    assert outline(default_targets(model)) == default
    order = [name for name, _ in model.named_modules()]
    assert found == sorted(found, key=order.index)


@pytest.mark.parametrize("model_type", MEASURED)
def test_measured_targets(model_type):
    """What was measured to end each block, in all towers, and which of it is the default."""
    model = base_of(model_type)
    expected = measured_targets(model, model_type, MEASURED)
    assert find_feed_forward_outputs(model) == expected
    patterns = MEASURED[model_type]["default"]
    if model_type != "phi4_multimodal":  # its towers' names end as the language model's
        assert default_targets(model) == [
            name for name in expected if any(re.fullmatch(pattern, name) for pattern in patterns)
        ]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_omni", "clip", "bart", "blip-2"])
def test_towers_alone(model_type):
    """Any part of a model has the targets that it has in the whole, an omni model's talker alone its own."""
    model = base_of(model_type)
    found = find_feed_forward_outputs(model)
    for name, tower in model.named_modules():
        inside = [target.removeprefix(f"{name}.") for target in found if target.startswith(f"{name}.")]
        if name and isinstance(tower, transformers.PreTrainedModel) and inside:
            assert find_feed_forward_outputs(tower) == inside
            assert set(default_targets(tower)) <= set(inside)
    if model_type == "qwen2_5_omni":
        assert outline(find_feed_forward_outputs(model.talker)) == {"model.layers.N.mlp.down_proj": 28}


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (LlamaConfig(**TINY), "layers.N.mlp.down_proj"),
        (MixtralConfig(**EXPERTS), "layers.N.mlp"),
        (PhiConfig(**TINY), "layers.N.mlp.fc2"),
    ],
)
def test_composites_with_other_parts(text, ending):
    """Towers are judged by themselves, whatever they are built into."""
    config = LlavaConfig(text_config=text, vision_config=SiglipVisionConfig(**SMALL, image_size=8, patch_size=4))
    model = on_meta(LlavaForConditionalGeneration, config)
    language = {f"model.language_model.{ending}": 2}
    assert outline(default_targets(model)) == language
    assert outline(find_feed_forward_outputs(model)) == language | {"model.vision_tower.encoder.layers.N.mlp.fc2": 2}


def test_encoder_decoders_of_two_models():
    """Both sides, the encoder one that only sees."""
    encoder = ViTConfig(**SMALL, image_size=8, patch_size=4)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, BertConfig(**SMALL, vocab_size=20))
    model = on_meta(VisionEncoderDecoderModel, config)
    assert len(default_targets(model)) == 4
    assert default_targets(model) == find_feed_forward_outputs(model)
    assert outline(default_targets(model))["decoder.bert.encoder.layer.N.output.dense"] == 2


def test_models_in_another_module():
    """Names are relative to the module that is asked; each model in it has the defaults that it has alone."""
    llava = base_of("llava")
    pair = nn.ModuleList([base_of("siglip"), nn.ModuleDict({"reader": llava, "head": nn.Linear(2, 2)})])
    for find in (find_feed_forward_outputs, default_targets):
        expected = [f"0.{name}" for name in find(pair[0])] + [f"1.reader.{name}" for name in find(llava)]
        assert find(pair) == expected
    assert find_feed_forward_outputs(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))) == []


def test_dense_blocks_among_sparse_ones():
    """One pattern for all blocks: where some are mixtures of experts, the others are adapted at the same place."""
    config = Qwen2MoeConfig(**TINY, num_experts=2, moe_intermediate_size=8, mlp_only_layers=[0])
    model = on_meta(Qwen2MoeModel, config)
    assert type(model.layers[0].mlp) is not type(model.layers[1].mlp)
    assert find_feed_forward_outputs(model) == ["layers.0.mlp", "layers.1.mlp"]


@pytest.mark.parametrize("inner", [8, 16, 32])
def test_feed_forward_parts_of_any_inner_width(inner):
    """Also those that are as wide as the block, or narrower."""
    model = on_meta(LlamaModel, LlamaConfig(**TINY | {"intermediate_size": inner}))
    assert find_feed_forward_outputs(model) == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]


def test_packed_weights():
    """Sizes are read off the layers' attributes: a quantised weight has another shape."""
    model = base_model("bert")
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(module.weight.numel() // 2, 1), requires_grad=False)
    assert find_feed_forward_outputs(model) == list(FAMILIES["bert"].targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_models(family):
    """The same names when the targets are adapted, with a prefix in PEFT's own model."""
    expected = find_feed_forward_outputs(base_model(family))
    model = adapted(family)
    assert find_feed_forward_outputs(model.get_base_model()) == expected
    assert find_feed_forward_outputs(model) == [f"base_model.model.{name}" for name in expected]
    assert default_targets(model.get_base_model()) == default_targets(base_model(family))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "clip"])
def test_models_with_another_methods_adapters(family):
    """LoRA's own layers, in attention and feed-forward parts, are no targets, and hide none."""
    expected = find_feed_forward_outputs(base_model(family))
    model = get_peft_model(base_model(family), LoraConfig(r=2, target_modules="all-linear"))
    assert find_feed_forward_outputs(model.get_base_model()) == expected


def test_parts_that_are_adapted_as_a_whole():
    """What lies in an adapted module goes by its name."""
    whole = ["layers.0.mlp", "layers.1.mlp"]
    for model in (LlamaModel(LlamaConfig(**TINY)), MixtralModel(MixtralConfig(**EXPERTS))):
        model = get_peft_model(model, ReadConfig(r=2, target_modules=["mlp"]))
        assert find_feed_forward_outputs(model.get_base_model()) == whole


def test_parts_that_are_trained_as_a_whole():
    """PEFT keeps copies of `modules_to_save`; none of them is a target."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])
    model = get_peft_model(LlamaModel(LlamaConfig(**TINY)), config)
    assert find_feed_forward_outputs(model.get_base_model()) == ["layers.0.mlp.down_proj"]


def test_pooling_heads():
    """Attention that pools a video into one vector isn't a block, though it is built as one."""
    model = on_meta(transformers.VJEPA2ForVideoClassification, transformers.VJEPA2Config(num_hidden_layers=2))
    assert hasattr(model.pooler, "self_attention_layers")
    assert not any("pooler" in name for name in find_feed_forward_outputs(model))
    assert outline(default_targets(model)) == {"vjepa2.encoder.layer.N.mlp.fc2": 2}


def test_a_stack_alone():
    """An encoder without its decoder, as in T5's encoder model."""
    config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=20)
    model = on_meta(transformers.T5EncoderModel, config)
    assert outline(default_targets(model)) == {"encoder.block.N.layer.N.DenseReluDense.wo": 2}
