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
    "videomae": r"decoder\.",
    "vit_mae": r"decoder\.",
    "vjepa2": r"predictor\.",
    "xclip": r"prompts_generator\.",
}

# Model types whose blocks give outputs of (time, batch, features).
TIME_FIRST = ("xlnet",)

# Model types that are given the mask of one of their towers, while their own blocks see other tokens: X-CLIP's see the
# frames of a video.
MASK_OF_A_TOWER = ("xclip",)

# Model types that pad their tokens on the right to a whole number of windows, by the entry of the configuration that
# tells.
WINDOWS = "attention_window"
