"""Names under which transformers and torch pass tokens, masks, positions and caches to a forward, all of them."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor


TOKENS = ("input_ids", "inputs_embeds", "hidden_states")
# True or 1 where a token is valid.
MASKS = ("attention_mask", "pixel_attention_mask", "patch_attention_mask")
# torch's: true, or a negative number, where a token is padding.
PADDING_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
# torch's: which pairs of tokens may not meet.
PAIR_MASKS = ("src_mask", "tgt_mask", "attn_mask", "mask")
POSITIONS = "position_ids"
# What of a part's arguments is kept while a forward runs: not its hidden states, which would keep their memory.
OF_PARTS = (*MASKS, *PADDING_MASKS, *PAIR_MASKS)
SEQUENCE_LENGTHS = "cu_seq_lens_q"  # where packed sequences start and end, for flash attention
# Frames, rows and columns of patches that each image or video has, `(videos, 3)`: a packed vision tower is given this.
# A model around one is given one for its images and one for its videos, by names that end so.
GRID = "grid_thw"
# Where images, videos or sounds begin and end among the rows of a packed tower's blocks.
EDGES = "cu_seqlens"
# Only continuous batching passes it: requests share the cache page by page.
PAGES = "write_index"
# Of tokens that aren't the model's own, or of what is learnt from them.
MASKS_OF_OTHERS = ("encoder_attention_mask", "cross_attention_mask", "loss_mask", "label_mask")
# Names that a cache usually has. A cache is known by its methods, under any name.
CACHES = ("cache", "past_key_values")
# Where other models keep what they know of earlier tokens: Mamba, XLNet, Reformer, RWKV, XLM and streaming encoders.
FOREIGN_STATES = ("cache_params", "mems", "past_buckets_states", "state", "padding_cache")


def is_cache(value: Any) -> bool:
    """Whether `value` has the methods of transformers' `Cache`."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def own_cache(cache: Any) -> Any:
    """Of an encoder-decoder's cache the part that counts the decoder's own tokens; another cache itself."""
    return getattr(cache, "self_attention_cache", cache)


def find_cache(values: Iterable[Any]) -> Any:
    """The first cache among the arguments or outputs of a forward, None if there is none."""
    return next((own_cache(value) for value in values if is_cache(value)), None)


def find_foreign_states(arguments: dict[str, Any]) -> str | None:
    """Name of an argument that holds states of earlier tokens, but not as a cache; None if none does."""
    for name in (*CACHES, *FOREIGN_STATES):
        value = arguments.get(name)
        if not isinstance(value, (Tensor, types.NoneType)) and not is_cache(value):
            return name
    return None


def find_mask(arguments: dict[str, Any]) -> Any:
    """The mask that a model was given; a dict of no masks is what generation passes where nothing is padded."""
    for name in MASKS:
        mask = arguments.get(name)
        if mask is not None and not (isinstance(mask, dict) and all(kind is None for kind in mask.values())):
            return mask
    return None


def find_grids(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The grids of patches that a model was given, by name."""
    found = {name: value for name, value in arguments.items() if name.endswith(GRID) and isinstance(value, Tensor)}
    return {name: value for name, value in found.items() if value.ndim == 2 and value.shape[1] == 3}


def outputs_of(output: Any) -> Iterable[Any]:
    """The fields of a model's output, a tuple's items, or the output itself; no field is asked for by name."""
    if isinstance(output, dict):
        return output.values()
    return output if isinstance(output, (tuple, list)) else (output,)
