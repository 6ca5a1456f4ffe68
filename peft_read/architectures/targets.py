"""Which modules READ adapts when nobody names them: the outputs of the feed-forward parts of transformer blocks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Set
from itertools import takewhile
from typing import NamedTuple, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from .exceptions import EXCEPTIONS, GENERATES, ONLY_BY_NAME


# In the names, of attributes or of classes, of what mixes the tokens of a sequence; the second is stronger.
MIXER = re.compile(r"attn|attention|mixer|mamba|mlstm|recurrent|delta_?net|short_?conv|fourier", re.IGNORECASE)
NO_MIXER = re.compile(r"(mlp|ffn|feed_?forward|moe|DecoderLayer)$", re.IGNORECASE)
# One query per sequence: no time to recur over.
POOLING = re.compile(r"Pooler|Pooling")
# Models that turn what another model says into sound.
SYNTHESIS = re.compile(r"Talker|TextToUnit|Token2Wav|Code2Wav|CodePredictor|DepthDecoder|Codec|Mimi|Tokenizer")


class Part(NamedTuple):
    """What a block, or a part of one, holds: `output` is the relative name of where its feed-forward part ends."""

    mixes: bool
    output: str
    sparse: bool


def find_feed_forward_outputs(model: nn.Module) -> list[str]:
    """Names of the modules where the feed-forward parts of a model's transformer blocks end, in all of its towers.

    That is, of each block, the linear layer that narrows back to the block's width, or the whole mixture of experts.
    Left out are pooling heads, and the models in a composite that make sound of what it says. Works on adapted
    models, too, where it names the adapted modules.

    Args:
        model: a transformers model, or any module that contains some.

    Returns:
        Full module names, in the order of the model; empty if it has no such blocks.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> find_feed_forward_outputs(BertModel(config))
        ['encoder.layer.0.output.dense', 'encoder.layer.1.output.dense']
    """
    modules = dict(_modules(model, _left_out(model)))
    stacks = [(name, module) for name, module in modules.items() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks: set[nn.Module] = set()
    found: set[str] = set()
    for name, stack in reversed(stacks):  # the innermost first
        found.update(_join(name, output) for output in _outputs_of_stack(stack, blocks))
    outputs = []
    for name in modules:
        pattern = EXCEPTIONS.get(_model_type(owner_of(model, name)))
        if name in found if pattern is None else re.fullmatch(rf"(.*\.)?({pattern})", name):
            outputs.append(name.partition(".base_layer.")[0])  # inside what is adapted as a whole: goes by that
    return list(dict.fromkeys(outputs))


def default_targets(model: nn.Module) -> list[str]:
    """The feed-forward outputs that READ adapts when nobody names any: where video and text run.

    In generative composites that is the language tower. Dual encoders and encoder-decoders are adapted on both sides.

    Args:
        model: a transformers model, or any module that contains some.

    Returns:
        Those names of [`find_feed_forward_outputs`] that lie in these towers, in the order of the model.
    """
    found = find_feed_forward_outputs(model)
    roots: list[str] = []
    for prefix, owner in _modules(model):
        if isinstance(owner, PreTrainedModel):
            by_name = ONLY_BY_NAME.get(_model_type(owner), "$")
            found = [name for name in found if not re.match(re.escape(_join(prefix, "")) + by_name, name)]
            if not any(_within(prefix, root) for root in roots):
                roots.append(prefix)
    for root in roots:
        inside = [name for name in found if _within(name, root)]
        wanted = set(_in_default_towers(model, root, inside) or inside)
        found = [name for name in found if name in wanted or name not in inside]
    return found


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


def attention_beside(model: nn.Module, name: str) -> list[nn.MultiheadAttention]:
    """Every `nn.MultiheadAttention` in the block that a module lies in; empty if the block has none.

    Args:
        model: the model that contains the module.
        name: the module's name in `model`.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
        others = {inner for blocks in lists for inner in blocks.modules()}
        found = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention) and m not in others]
        if found or (end and parts[end - 1].isdigit()):  # the block itself, as a member of a list
            return found
    return []


def is_causal(owner: nn.Module) -> bool:
    """Whether a model generates its tokens: each of them sees only earlier ones."""
    config = getattr(owner, "config", None)
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return True
    if any(getattr(module, "is_causal", False) is True for module in owner.modules()):
        return True
    if not isinstance(owner, PreTrainedModel):
        return False
    if type(owner).__name__.endswith("Decoder"):  # others that are called so take no words, such as DETR's
        return "input_ids" in inspect.signature(type(owner).forward).parameters
    model_type = _model_type(owner)
    # Where a type can be both, its config says which, or its attention.
    both = hasattr(config, "is_decoder") or model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    towers = {
        part for m in owner.modules() if isinstance(m, PreTrainedModel) and m is not owner for part in m.modules()
    }
    both = both or any(getattr(m, "is_causal", None) is False for m in owner.modules() if m not in towers)
    return model_type in GENERATES or (model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both)


def is_causal_language_model(owner: nn.Module) -> bool:
    """Whether a model is a language model whose tokens see only earlier ones, which it may be asked to continue.

    Text encoders that look back only, as CLIP's, don't count: nothing is written from their tokens.
    """
    if is_causal(owner):
        return True
    config = getattr(owner, "config", None)
    model_type = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):  # its encoder
        return False
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def takes_text(owner: nn.Module | None) -> bool:
    """Whether text is among a model's inputs."""
    return "text" in getattr(owner, "input_modalities", "text")


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


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _within(name: str, prefix: str) -> bool:
    return not prefix or f"{name}.".startswith(f"{prefix}.")


def _model_type(owner: nn.Module) -> str:
    return getattr(owner.config, "model_type", "") if isinstance(owner, PreTrainedModel) else ""


def _modules(model: nn.Module, without: Set[nn.Module] = frozenset()) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base model: what is adapted goes by its wrapper's name, adapters don't occur."""
    return _walk(model, "", set(without))


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    path = name
    while isinstance(module, BaseTunerLayer) and module not in seen:
        seen.add(module)
        module, path = cast(nn.Module, module.base_layer), _join(path, "base_layer")
    # What is in `modules_to_save` is trained as a whole, and there in several copies.
    if module in seen or isinstance(module, AuxiliaryTrainingWrapper):
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(child, _join(path, child_name), seen)


def _left_out(model: nn.Module) -> set[nn.Module]:
    """Pooling heads, and the synthesisers inside models that aren't synthesisers themselves."""
    owners = {module for module in model.modules() if isinstance(module, PreTrainedModel)}
    synthesisers = {owner for owner in owners if SYNTHESIS.search(type(owner).__name__)}
    inner = {module for owner in owners - synthesisers for module in owner.modules()}
    return synthesisers & inner | {module for module in model.modules() if POOLING.search(type(module).__name__)}


def _outputs_of_stack(stack: nn.Module, blocks: set[nn.Module]) -> list[str]:
    """Where the feed-forward parts of a list's members end, if these are blocks; adds them to `blocks`."""
    parts: dict[str, Part] = {}
    for name, member in stack.named_children():
        if not blocks.isdisjoint(member.modules()):
            continue
        # A member may hold several blocks, such as one over space and one over channels.
        inner = {f"{name}.{n}": _part(c) for n, c in member.named_children() if not _is_mixer(n, c)}
        inner = {n: part for n, part in inner.items() if part.mixes and part.output}
        parts |= inner if len(inner) > 1 else {name: _part(member)}
    kinds = [(part.mixes, bool(part.output)) for part in parts.values()]
    # Or parts of blocks take turns; the sublayers of one block have one feed-forward part among them.
    take_turns = (True, False) in kinds and kinds.count((False, True)) > 1
    if (True, True) not in kinds and not take_turns:
        return []
    blocks.update(stack.modules())
    outputs = {name: part.output for name, part in parts.items() if part.output}
    # The dense blocks among sparse ones are adapted at the same place.
    sparse = {part.output for part in parts.values() if part.sparse}
    return [f"{name}.{next((s for s in sparse if _within(output, s)), output)}" for name, output in outputs.items()]


def _part(block: nn.Module) -> Part:
    """What a module holds, its feed-forward part being outside of what mixes tokens."""
    mixers = {module for name, module in _modules(block) if _is_mixer(name, module) and name}
    modules = dict(_modules(block, mixers))
    experts = [name.split(".") for name, module in modules.items() if _is_experts(name, module)]
    around = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in experts), strict=False))
    sparse = re.sub(r"(\.base_layer)+$", "", ".".join(parts[0] for parts in around))
    if sparse:
        return Part(bool(mixers), sparse, sparse=True)
    # What the mixers take in is as wide as the block, even if its feed-forward part takes in more.
    inside = (next(filter(None, map(_sizes, mixer.modules())), None) for mixer in mixers)
    best, output, widened = (False, 0), "", {size[0]: 0 for size in inside if size}
    sizes = {name: size for name, module in modules.items() if (size := _sizes(module))}
    for name, (inner, width) in sizes.items():
        narrows = inner > width and widened.get(width, 0) > width
        # Gates and low-rank paths are narrower inside than the feed-forward part; of two like it, the last counts.
        if width in widened and (narrows or mixers) and (narrows, inner) >= best:
            best, output = (narrows, inner), name
        widened[inner] = max(width, widened.get(inner, 0))
    return Part(bool(mixers), output, sparse=False)


def _is_experts(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")


def _is_mixer(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if _sizes(module) or NO_MIXER.search(kind) or not MIXER.search(f"{name.rpartition('.')[2]} {kind}"):
        return False
    weights = (p for m in module.modules() if not isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(False))
    return any(weight.ndim > 1 for weight in weights)  # unlike in a norm


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Widths of a linear layer's input and output; not from its weights, which may be packed."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inner, width = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inner, width) if isinstance(inner, int) and isinstance(width, int) else None


def _in_default_towers(model: nn.Module, root: str, names: list[str]) -> list[str]:
    """Those targets of an outermost transformers model that lie where video and text run."""
    owner = cast(PreTrainedModel, model.get_submodule(root))
    owner = getattr(owner, "thinker", owner)  # an omni model that speaks: the part of it that understands
    paths = {module: name for name, module in _modules(model)}
    sides = [owner.get_decoder() or owner]
    together = all(_within(name, paths.get(sides[0], "")) for name in names)
    if owner.config.is_encoder_decoder:
        sides.append(owner.get_encoder())
    elif not (takes_text(owner) and (together or is_causal(sides[0]) or _reads_features(owner))):
        return names  # only sees or hears, or is a dual encoder
    wanted = []
    for name in names:
        side = next((side for side in sides if side in paths and _within(name, paths[side])), None)
        # What only sees or hears, inside of what reads, is a tower of its own.
        reads = takes_text(side) and getattr(side, "main_input_name", "") == "input_ids"
        if side is not None and (takes_text(owner_of(model, name)) or not reads):
            wanted.append(name)
    return wanted


def _reads_features(owner: nn.Module) -> bool:
    """Whether a model puts other towers' features among its text, rather than giving text features of its own."""
    features = {
        kind
        for module in owner.modules()
        for kind in ("image", "video", "audio", "text")
        if hasattr(module, f"get_{kind}_features")
    }
    return bool(features) and "text" not in features
