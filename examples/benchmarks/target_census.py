"""On how many model types of transformers READ finds the feed-forward outputs, and on which it doesn't.

    python examples/benchmarks/target_census.py            # every model type
    python examples/benchmarks/target_census.py t5 llava   # some, with what was found
    python examples/benchmarks/target_census.py --run      # with a forward, where nothing was measured

Builds each type from its default config on the meta device, where weights take neither time nor memory: the base model
and the language model, or where a type has neither, what it has for other tasks. A type is right if all of these are,
as far as they can be built. It is judged by the strongest evidence that there is:

- measured: the targets in `tests/architectures/read_targets.json`, of the type and of the towers in it, have to be
  found.
- read from code: the same, but these targets, the entries with the source "code", weren't measured, or not all.
- own rule: elsewhere the blocks are looked up by a simple rule of the census's own (`blocks_of`), and each has to hold
  exactly one target, of the block's width, and none may lie outside: that shows slips, but not a mistake that both
  rules make. With `--run` each target has to be what runs last in its block, too, of the linear layers outside of
  attention: where simple inputs are enough for a forward of the first class. That takes some minutes more.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, logging
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_read import find_feed_forward_outputs
from peft_read.architectures.targets import default_targets, owner_of


MEASURED = Path(__file__).parents[2] / "tests" / "architectures" / "read_targets.json"
# The base model, and what people fine-tune most.
AUTO_CLASSES = ("", "FOR_CAUSAL_LM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_MULTIMODAL_LM", "FOR_SPEECH_SEQ_2_SEQ")
AUTO_CLASSES += ("FOR_IMAGE_TEXT_TO_TEXT", "FOR_TEXT_TO_WAVEFORM", "FOR_PRETRAINING")
AUTO_CLASSES = tuple("_".join(part for part in ("MODEL", name, "MAPPING") if part) for name in AUTO_CLASSES)
OTHER_CLASSES = tuple(name for name in dir(modeling_auto) if re.fullmatch("MODEL_FOR_.*_MAPPING", name))
MEASUREMENT, CODE, OWN_RULE = JUDGES = ("measured", "read from code", "own rule")
NO_BLOCKS, NOT_BUILT, NO_CLASS = "no transformer blocks", "can't be built here", "no model class of their own"
SECONDS, SECONDS_OF_FORWARD, GIGABYTES = 60, 15, 16
ATTENTION = re.compile(
    "(Attention|Attn|MLA|Mamba|DeltaNet|xLSTMLayer|ShortConv|RecurrentBlock)(?!.*(MLP|DecoderLayer)$)"
)
# What talks, and codecs, which READ leaves alone inside other models.
LEFT_OUT = re.compile(r"(.*\.)?(codec_model|depth_decoder|t2u_model|talker|token2wav)\..*")
# What runs in a block after its feed-forward part: RWKV's gate, embeddings of each layer's own, what takes
# MobileBERT's part to the width of its residual stream, and Zamba's shared block to a Mamba layer.
AFTERWARDS = re.compile(
    r".*\.(feed_forward\.receptance|ple_block\.\w+|output\.bottleneck\.dense)|(.*\.)?layers\.\d+\.linear"
)
EXPERTS = re.compile("Experts$|MoE$|MoeBlock$")


def classes_of(model_type: str) -> list[type[PreTrainedModel]]:
    """The model classes of a type, base model first; those for other tasks only where it has no such class."""
    return _classes_in(AUTO_CLASSES, model_type) or _classes_in(OTHER_CLASSES, model_type)


def _classes_in(mappings: tuple[str, ...], model_type: str) -> list[type[PreTrainedModel]]:
    config_class, classes = CONFIG_MAPPING[model_type], []
    for name in mappings:
        try:
            found = getattr(modeling_auto, name).get(config_class, ())
        except ValueError:  # listed by transformers, but not there
            continue
        classes += found if isinstance(found, (tuple, list)) else [found]
    return list(dict.fromkeys(classes))


def time_out(*_: object) -> None:
    """Ends a model that takes too long, as a handler of a signal."""
    raise TimeoutError


def build(model_class: type[PreTrainedModel], model_type: str, **options: object) -> PreTrainedModel | None:
    """A model from the default config, but for the options, on the meta device; None where there is no such thing."""
    signal.signal(signal.SIGALRM, time_out)
    signal.alarm(SECONDS)
    try:
        with torch.device("meta"):
            return model_class(CONFIG_MAPPING[model_type](**options))
    except Exception:  # configs without usable defaults raise all kinds of errors
        return None
    finally:
        signal.alarm(0)


def measured_targets(model: PreTrainedModel, model_type: str, measured: dict[str, dict[str, Any]]) -> list[str]:
    """The names in a model that the measured patterns say, empty if its type wasn't measured."""
    if model_type not in measured:
        return []
    names = []
    for name, _ in model.named_modules():
        if LEFT_OUT.fullmatch(name):
            continue
        owner = owner_of(model, name)
        types = {model_type, getattr(getattr(owner, "config", None), "model_type", model_type)}
        listed = [measured.get(key, {}) for key in types]
        patterns = [p for entry in listed for p in entry.get("default", []) + entry.get("towers", [])]
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            names.append(name)
    return names


def blocks_of(model: nn.Module) -> list[str]:
    """Innermost members of module lists that hold attention (or a state space) and, outside it, a feed-forward part.

    By the names of classes and the number of linear layers: a rule of its own, to check the package's. Of a member
    with several children like that, these are the blocks; where attention and feed-forward parts take turns as
    members, those with a feed-forward part.
    """
    blocks: list[str] = []
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    for name, members in reversed(lists):
        free = {f"{name}.{key}".strip("."): member for key, member in members.named_children()}
        free = {p: m for p, m in free.items() if not (LEFT_OUT.match(p) or any(b.startswith(f"{p}.") for b in blocks))}
        kinds = {path: parts_of(member) for path, member in free.items()}
        halves = [path for path, kind in kinds.items() if kind == (False, True)]
        if (True, False) in kinds.values() and len(halves) > 1:
            blocks += halves
        for path in (path for path, kind in kinds.items() if kind == (True, True)):
            inner = [f"{path}.{key}" for key, m in free[path].named_children() if parts_of(m) == (True, True)]
            blocks += inner if len(inner) > 1 else [path]
    return blocks


def parts_of(member: nn.Module) -> tuple[bool, bool]:
    """Whether a member of a list holds attention, and a feed-forward part outside of it."""
    attention = [m for m in member.modules() if m is not member and ATTENTION.search(type(m).__name__)]
    inside = {m for part in attention for m in part.modules()}
    outside = [m for m in member.modules() if m is not member and m not in inside]
    linears = [m for m in outside if hasattr(m, "in_features") or isinstance(m, transformers.Conv1D)]
    return bool(attention), len(linears) > 1 or any(EXPERTS.search(type(m).__name__) for m in outside)


def faults_of(model: PreTrainedModel, found: list[str]) -> Iterator[str]:
    """What contradicts the blocks of a model that wasn't measured."""
    blocks = blocks_of(model)
    for name in blocks:
        block = model.get_submodule(name)
        inside = [target for target in found if target.startswith(f"{name}.")]
        if len(inside) != 1:
            yield f"{len(inside)} targets in {name}"
        widths = {m.weight.shape[-1] for m in block.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")}
        for target in inside:
            width = getattr(model.get_submodule(target), "out_features", None)
            if widths and width is not None and width not in widths:
                yield f"{target} has width {width}, the block's norms {sorted(widths)}"
    for target in found:
        if not any(target.startswith(f"{name}.") for name in blocks):
            yield f"{target} is in no block"


def inputs_of(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What models of many kinds take, to be tried in turn."""
    taken = inspect.signature(model.forward).parameters
    configs = (model.config, getattr(model.config, "vision_config", None))
    size = next((size for config in configs if (size := getattr(config, "image_size", None))), 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    ids, image = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 3, height, width)
    kinds = {
        "input_ids": [ids],
        "pixel_values": [image, image[:, None].expand(1, 2, 3, height, width)],
        "pixel_values_videos": [image[:, None].expand(1, 8, 3, height, width)],
        "input_values": [torch.zeros(1, 16000)],
        "input_features": [torch.zeros(1, 80, 3000), torch.zeros(1, 200, 80)],
    }
    for name in filter(taken.__contains__, kinds):
        for value in kinds[name]:
            given = {name: value.bfloat16() if value.is_floating_point() else value}
            yield given
            yield from (given | {text: ids} for text in ("decoder_input_ids", "input_ids") if text in taken)


@torch.no_grad()
def last_in_blocks(model: nn.Module, targets: list[str], inputs: dict[str, Tensor]) -> dict[str, str]:
    """By target, what ran last in its block, the target or a linear layer outside of attention; if its block ran."""
    last, hooks = dict[str, str](), []
    attention = {part for m in model.modules() if ATTENTION.search(type(m).__name__) for part in m.modules()}
    for block in blocks_of(model):
        for target in (name for name in targets if name.startswith(f"{block}.")):
            for name, module in model.get_submodule(block).named_modules(prefix=block):
                linear = hasattr(module, "in_features") or isinstance(module, transformers.Conv1D)
                if name == target or (linear and module not in attention and not AFTERWARDS.fullmatch(name)):
                    hook = module.register_forward_hook(lambda *_, key=target, name=name: last.update({key: name}))
                    hooks.append(hook)
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return last


def run(model: PreTrainedModel, found: list[str]) -> dict[str, str] | None:
    """What ran last in the block of each target, on the meta device; None if no inputs get to the default targets."""
    model = model.eval().to(torch.bfloat16)  # in which alone experts run on that device
    needed = set(default_targets(model))
    with torch.device("meta"):
        for inputs in inputs_of(model):
            signal.alarm(SECONDS_OF_FORWARD)
            try:
                last = last_in_blocks(model, found, inputs)
            except Exception:  # other inputs are needed, or values, which this device hasn't
                continue
            finally:
                signal.alarm(0)
            if needed <= set(last):
                return last
    return None


def outline(names: list[str]) -> str:
    """Names with their numbers left out, and how many there are of each."""
    counts = Counter(re.sub(r"\b\d+\b", "N", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def judge(model_type: str, measured: dict[str, dict[str, Any]], verbose: bool = False) -> tuple[str, list[str]]:
    """By what a type is judged, or why it isn't, and what is wrong with the targets found in its models."""
    classes = classes_of(model_type)
    models = [model for model_class in classes if (model := build(model_class, model_type))]
    has_blocks, faults = False, []
    for model in models:
        found, expected = find_feed_forward_outputs(model), measured_targets(model, model_type, measured)
        has_blocks |= bool(found or expected or blocks_of(model))
        kind = type(model).__name__
        if verbose:
            print(f"{kind}: {outline(found)}")
        if model_type in measured:
            missing, extra = (sorted(set(a) - set(b)) for a, b in ((expected, found), (found, expected)))
            faults += [f"{kind}: missing {outline(missing)}"] if missing else []
            faults += [f"{kind}: not a target {outline(extra)}"] if extra else []
        else:
            counts = Counter(re.sub(r"\b\d+\b", "N", fault) for fault in faults_of(model, found))
            faults += [f"{kind}: {fault} ({count} times)" for fault, count in counts.items()]
    if not has_blocks:
        return NO_BLOCKS if models else NOT_BUILT if classes else NO_CLASS, faults
    if model_type not in measured:
        return OWN_RULE, faults
    return CODE if measured[model_type].get("source") == "code" else MEASUREMENT, faults


def judge_forward(model_type: str) -> tuple[bool, list[str]]:
    """Whether the first model of a type that can be built ran, and what ran after a target in its block."""
    model = next(filter(None, (build(model_class, model_type) for model_class in classes_of(model_type))))
    last = run(model, find_feed_forward_outputs(model))
    others = {name: end for name, end in (last or {}).items() if name != end}
    return bool(last), [f"{type(model).__name__}: {end} runs after {name}" for name, end in others.items()]


def main() -> None:
    """Judge the targets of the model types, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them by default")
    parser.add_argument("--run", action="store_true", help="check in a forward, too, what nothing was measured of")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
    measured = json.loads(MEASURED.read_text())
    right, types, wrong, ran = Counter[str](), dict[str, list[str]](), 0, 0
    for model_type in args.types or sorted(CONFIG_MAPPING):
        judged_by, faults = judge(model_type, measured, verbose=bool(args.types))
        if args.run and judged_by == OWN_RULE:
            ran_this, contradictions = judge_forward(model_type)
            ran, faults = ran + ran_this, faults + contradictions
        types.setdefault(judged_by, []).append(model_type)
        right[judged_by] += not faults
        if faults:
            wrong += 1
            print(f"wrong: {model_type}", *faults, sep="\n    ")
    judged = sum(len(types.get(name, [])) for name in JUDGES)
    print(f"transformers {transformers.__version__}: {sum(map(len, types.values()))} model types")
    print(f"with transformer blocks: {judged}, of which right {judged - wrong} ({1 - wrong / max(judged, 1):.1%})")
    for name in JUDGES:
        print(f"    {name}: right {right[name]} of {len(types.get(name, []))}")
    if args.run:
        print(f"        of which ran, the targets last in their blocks or else wrong: {ran}")
    print(f"{NO_BLOCKS}: {len(types.get(NO_BLOCKS, []))}")
    print(f"{NO_CLASS}, most of them parts of others: {len(types.get(NO_CLASS, []))}")
    print(f"{NOT_BUILT}, not judged: {len(types.get(NOT_BUILT, []))}", *types.get(NOT_BUILT, []), sep="\n    ")
    sys.exit(bool(wrong) and bool(args.types))


if __name__ == "__main__":
    main()
