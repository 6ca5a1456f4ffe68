"""Makes a model's default configuration tiny, whatever the family calls its sizes."""

from transformers import PreTrainedConfig


LAYERS = 2
WIDTH = 32
VOCAB = 160
IMAGE, PATCH = 32, 16
FRAMES = 4

# By the names of attributes, in a configuration and all that are nested in it.
SIZES = (
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim encoder_hidden_size "
        "projection_dim projection_size image_text_hidden_size mit_hidden_size out_hidden_size output_dim "
        "pooler_hidden_size pooler_output_size output_hidden_size conv_channels decoder_hidden_size",
    ),
    (
        2 * WIDTH,
        "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_hidden_size "
        "mit_intermediate_size shared_expert_intermediate_size moe_intermediate_size decoder_intermediate_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers depth "
        "mit_num_hidden_layers decoder_num_hidden_layers num_experts_per_tok num_key_value_heads prompt_layers",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "mit_num_attention_heads prompt_num_attention_heads decoder_num_attention_heads num_experts num_local_experts",
    ),
    (8, "head_dim d_kv query_pre_attn_scalar sliding_window local_attention"),
    (VOCAB, "vocab_size decoder_vocab_size"),
    (64, "max_position_embeddings n_positions max_target_positions max_source_positions"),
    (IMAGE, "image_size"),
    (PATCH, "patch_size"),
    (FRAMES, "num_frames"),
    (16, "num_mel_bins input_feat_per_channel"),
    # Random weights that differ enough for tokens to differ from each other.
    (0.15, "initializer_range init_std"),
    # Nothing random in a forward.
    (0.0, "layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate mask_time_prob mask_feature_prob"),
)
VALUES = {name: value for value, names in SIZES for name in names.split()} | {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "apply_spec_augment": False,
}
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def shrink(config: PreTrainedConfig, changes: dict[str, object], prefix: str = "") -> PreTrainedConfig:
    """Set the sizes of a default configuration, and of those nested in it, to tiny ones.

    Args:
        config: the configuration, changed in place.
        changes: what else to set, by dotted path such as `text_config.head_dim`.
        prefix: path of `config` itself.
    """
    for name in config.to_dict():
        value = getattr(config, name, None)
        if prefix + name in changes:
            setattr(config, name, changes[prefix + name])
        elif isinstance(value, PreTrainedConfig):
            shrink(value, changes, f"{prefix}{name}.")
        elif name.endswith(("dropout", "dropout_prob", "pdrop", "dropout_rate")) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name in PER_LAYER and isinstance(value, list):
            # The last ones: where kinds of layer alternate, both kinds remain.
            setattr(config, name, value[-LAYERS:])
        elif name.endswith("token_id") and VALUES.get(name, 0) == 0 and name != "pad_token_id":
            continue
        elif name in VALUES and (value is not None or name in ("pad_token_id", "eos_token_id", "bos_token_id")):
            setattr(config, name, _in_the_form_of(value, VALUES[name]))
    for name, value in changes.items():
        if name.startswith(prefix) and "." not in name.removeprefix(prefix):
            setattr(config, name.removeprefix(prefix), value)
    return config


def _in_the_form_of(old: object, new: object) -> object:
    """A size per axis remains one, an integer remains one."""
    if isinstance(old, (list, tuple)) and new is not None:
        return [new] * len(old)
    return int(new) if isinstance(old, int) and isinstance(new, float) else new
