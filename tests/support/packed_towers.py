"""Tiny random models of the families whose vision tower is packed, and patches of videos and images for them."""

import functools

import torch
import transformers
from conformance.shrink import shrink

from peft_read.forward.frames import takes_grid


PATCH, MERGE = 4, 2
# Frames, rows and columns of patches. Rows and columns are whole windows of Qwen2.5-VL's, or a window and a rest.
VIDEOS = ((3, 4, 4), (2, 6, 4), (3, 2, 6))
IMAGES = ((1, 4, 4), (1, 6, 4))
MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
PLACES = {"vision_config.num_position_embeddings": 64}
DEEP = PLACES | {"vision_config.deepstack_visual_indexes": [0, 1]}
WINDOWS = {"vision_config.fullatt_block_indexes": [1], "vision_config.window_size": 2 * MERGE * PATCH}
IDS = ("image", "video", "vision_start", "vision_end", "image_start", "image_end", "video_start", "video_end", "audio")
TOKENS = {f"{name}_token_id": number for number, name in enumerate(IDS, start=100)}
# By model type: the class of the model, and what its tiny configuration needs beside small sizes.
MODELS = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", MROPE),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", MROPE | WINDOWS),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", MROPE | DEEP),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", MROPE | DEEP),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", MROPE | PLACES),
    "glm4v": ("Glm4vForConditionalGeneration", MROPE),
    "glm46v": ("Glm46VForConditionalGeneration", MROPE),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration", {}),
    "qwen2_5_omni_thinker": ("Qwen2_5OmniThinkerForConditionalGeneration", MROPE | WINDOWS),
    "qwen3_omni_moe_thinker": ("Qwen3OmniMoeThinkerForConditionalGeneration", MROPE | DEEP),
}


@functools.cache
def config_of(family):
    name, changes = MODELS[family]
    config_class = getattr(transformers, name).config_class
    return shrink(config_class(), TOKENS | {"vision_config.patch_size": PATCH} | changes)


def base_model(family):
    """The family's tiny model, frozen, always with the same weights."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[family][0])(config_of(family))
    return model.eval().requires_grad_(False)


def tower_of(model):
    """The packed tower inside of a model that may be adapted."""
    return next(m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and takes_grid(m))


def patches(family, grid, seed=0):
    """Random patches `(rows, features)` of each image or video of a grid, always the same for the same seed."""
    vision = config_of(family).vision_config
    features = 3 * getattr(vision, "temporal_patch_size", 1) * PATCH**2
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t * h * w, features, generator=generator) for t, h, w in grid]


def pictures(family, kind, parts, grid):
    """The arguments of a model for some videos (`kind="video"`) or images (`"image"`)."""
    pixels = "pixel_values_videos" if kind == "video" else "pixel_values"
    given = {pixels: torch.cat(parts), f"{kind}_grid_thw": torch.tensor(grid)}
    if family == "video_llama_3":
        given[f"{kind}_merge_sizes"] = torch.full((len(grid),), MERGE)
    return given


def features_of(model, family, kind, parts, grid):
    """What a model finds in each of some videos or images: a tensor `(merged patches, features)` each."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owner = getattr(base, "model", base)
    owner = owner if hasattr(owner, f"get_{kind}_features") else base
    found = getattr(owner, f"get_{kind}_features")(**pictures(family, kind, parts, grid))
    states = found.pooler_output if found.get("pooler_output") is not None else found.last_hidden_state
    sizes = [t * h * w // MERGE**2 for t, h, w in grid]
    return states.split(sizes) if isinstance(states, torch.Tensor) else states
