"""All that is known of single model types, where a model's structure and its arguments don't tell."""

from __future__ import annotations


# Blocks of which the structure doesn't tell, by the `model_type` of the innermost `PreTrainedModel` that owns them, so
# that a composite model needs no entry of its own. Patterns match the end of a name, from a dot on.
EXCEPTIONS: dict[str, str] = {
    # Feed-forward parts of their own for queries and for text.
    "blip_2_qformer": r"encoder\.layer\.\d+\.output(_query)?\.dense",
    "instructblip_qformer": r"encoder\.layer\.\d+\.output(_query)?\.dense",
    "instructblipvideo_qformer": r"encoder\.layer\.\d+\.output(_query)?\.dense",
    # The same for language and vision in the layers where they meet.
    "lxmert": r"(layer|r_layers)\.\d+\.output\.dense|x_layers\.\d+\.(lang|visn)_output\.dense",
    # Audio tokens have another feed-forward part than text.
    "higgs_audio_v2": r"layers\.\d+\.mlp\.down_proj",
    # The block's width is only that of its residual stream; the last feed-forward part is narrower.
    "mobilebert": r"encoder\.layer\.\d+\.output\.dense",
    # Attention and feed-forward parts in a list each.
    "flaubert": r"ffns\.\d+\.lin2",
    "xlm": r"ffns\.\d+\.lin2",
}

# Parts of a model, by its `model_type`, that are adapted by name only, where nothing else says so: what reconstructs
# or predicts in pre-training, makes prompts, or acts; and towers that don't tell what they take in.
ONLY_BY_NAME: dict[str, str] = {
    "evolla": r"protein_encoder\.",
    "idefics": r"(vision_model|perceiver_resampler)\.",
    "pi0": r"(dit|vlm\.vision_tower)\.",
    # Its streams, which predict several tokens ahead, lie one after another on the axis of time.
    "prophetnet": r"decoder\.",
    "videomae": r"decoder\.",
    "vit_mae": r"decoder\.",
    "vjepa2": r"predictor\.",
    "xclip": r"prompts_generator\.",
}

# Model types that generate, though neither their configs nor transformers' lists of models say so.
GENERATES = ("gpt_neox_japanese", "imagegpt")

# Model types whose blocks give outputs of (time, batch, features).
TIME_FIRST = ("fsmt", "xlnet")

# Modules, by a pattern in their names, in models of a type, by the pattern of the class, whose outputs have no axis of
# time alone.
NO_TIME_AXIS: dict[str, str] = {
    "prophetnet": "ProphetNetDecoder",
}

# Modules that see other tokens than the model's `attention_mask` is about, though it may have as many: by the
# `model_type` of their model, patterns in their names, and the argument that is about these tokens; None if none of
# them is padding.
MASKS_OF_TOWERS: dict[str, dict[str, str | None]] = {
    "bridgetower": {r"cross_modal_image_layers\.": None},
    "idefics": {r"(^|\.)(vision_model|perceiver_resampler)\.": None},
    "lxmert": {r"(^|\.)(r_layers\.|x_layers\.\d+\.visn_)": "visual_attention_mask"},
    "perceiver": {"": None},  # latents
    "xclip": {"": None},  # the frames of a video
}
