"""Which modules READ adapts when nobody names them: the outputs of the feed-forward parts of transformer blocks."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel


# By the `model_type` of the innermost `PreTrainedModel` that owns the module, so that a composite model needs no entry
# of its own. Patterns match the end of a name from a dot on; shorter endings would also hit `attention.output.dense`
# or `attn.c_proj`.
FEED_FORWARD_OUTPUTS: dict[str, str] = {
    "bart": r"layers\.\d+\.fc2",
    "bert": r"encoder\.layer\.\d+\.output\.dense",
    "clip_text_model": r"layers\.\d+\.mlp\.fc2",
    "clip_vision_model": r"layers\.\d+\.mlp\.fc2",
    "gpt2": r"h\.\d+\.mlp\.c_proj",
    "llama": r"layers\.\d+\.mlp\.down_proj",
    "t5": r"block\.\d+\.layer\.\d+\.DenseReluDense\.wo",
    "vit": r"layers\.\d+\.mlp\.fc2",
}


def find_feed_forward_outputs(model: nn.Module) -> list[str]:
    """Names of the modules that READ adapts by default: where each transformer block's feed-forward part ends.

    Args:
        model: a transformers model, or any module that contains some.

    Returns:
        Full module names, in the order of the model; empty if no part of `model` is of a known type.
    """
    names = []
    for name, _ in model.named_modules():
        owner = owner_of(model, name)
        pattern = FEED_FORWARD_OUTPUTS.get(owner.config.model_type) if isinstance(owner, PreTrainedModel) else None
        if pattern is not None and re.fullmatch(rf"(.*\.)?{pattern}", name):
            names.append(name)
    return names


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The model whose forward a module belongs to: its innermost `PreTrainedModel`, else `model` itself.

    Args:
        model: the model that contains the module.
        name: the module's name in `model`.
    """
    owner = module = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            owner = module
    return owner


def is_causal(owner: nn.Module) -> bool:
    """Whether a model's tokens see only earlier ones."""
    if getattr(getattr(owner, "config", None), "is_decoder", False):
        return True
    return any(getattr(module, "is_causal", False) is True for module in owner.modules())


def block_index(name: str, layers_pattern: list[str] | str | None = None) -> int | None:
    """Index of the block that a module lies in: the first number in its name, as in PEFT.

    Args:
        name: the module's name.
        layers_pattern: names that the list of blocks may have; any by default.

    Returns:
        The index, None outside such lists.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]+"]
    matches = (re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name) for pattern in patterns)
    return next((int(match[1]) for match in matches if match), None)
