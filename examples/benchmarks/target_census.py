"""On how many model types of transformers READ finds the feed-forward outputs, and on which it doesn't.

    python examples/benchmarks/target_census.py            # every model type
    python examples/benchmarks/target_census.py t5 llava   # some, with what was found

Builds each type from its default config on the meta device, where weights take neither time nor memory: the base model
and the language model. A type is right if all of these are. Where `tests/read_targets.json` has targets for a type,
and for the towers in it, these have to be found; most were measured, those with the source "code" were read from it.
Elsewhere the blocks are looked up by a simple rule of the census's own (`blocks_of`), and each has to hold exactly one
target, of the block's width, and none may lie outside: that shows slips, but not a mistake that both rules make.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, logging
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_read import find_feed_forward_outputs
from peft_read.read.targets import owner_of


MEASURED = Path(__file__).parents[2] / "tests" / "read_targets.json"
# The base model, and what people fine-tune most.
AUTO_CLASSES = ("", "FOR_CAUSAL_LM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_MULTIMODAL_LM", "FOR_SPEECH_SEQ_2_SEQ")
AUTO_CLASSES += ("FOR_IMAGE_TEXT_TO_TEXT", "FOR_TEXT_TO_WAVEFORM", "FOR_PRETRAINING")
SECONDS, GIGABYTES = 60, 16
ATTENTION = re.compile(
    "(Attention|Attn|MLA|Mamba|DeltaNet|xLSTMLayer|ShortConv|RecurrentBlock)(?!.*(MLP|DecoderLayer)$)"
)
# What talks, and codecs, which READ leaves alone inside other models.
LEFT_OUT = re.compile(r"(.*\.)?(codec_model|depth_decoder|t2u_model|talker|token2wav)\..*")
EXPERTS = re.compile("Experts$|MoE$|MoeBlock$")


def classes_of(model_type: str) -> list[type[PreTrainedModel]]:
    """The model classes of a type, base model first."""
    config_class, classes = CONFIG_MAPPING[model_type], []
    for name in AUTO_CLASSES:
        mapping = getattr(modeling_auto, "_".join(part for part in ("MODEL", name, "MAPPING") if part))
        try:
            found = mapping.get(config_class, ())
        except ValueError:  # listed by transformers, but not there
            continue
        classes += found if isinstance(found, (tuple, list)) else [found]
    return list(dict.fromkeys(classes))


def time_out(*_: object) -> None:
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


def measured_targets(model: PreTrainedModel, model_type: str, measured: dict[str, dict[str, list[str]]]) -> list[str]:
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


def outline(names: list[str]) -> str:
    """Names with their numbers left out, and how many there are of each."""
    counts = Counter(re.sub(r"\b\d+\b", "N", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def judge(model_type: str, measured: dict[str, dict[str, list[str]]], verbose: bool = False) -> tuple[bool, list[str]]:
    """Whether models of a type have blocks, and what is wrong with the targets found in them."""
    has_blocks, faults = False, []
    for model_class in classes_of(model_type):
        model = build(model_class, model_type)
        if model is None:
            continue
        found, expected = find_feed_forward_outputs(model), measured_targets(model, model_type, measured)
        has_blocks |= bool(found or expected or blocks_of(model))
        if verbose:
            print(f"{model_class.__name__}: {outline(found)}")
        if model_type in measured:
            missing, extra = (sorted(set(a) - set(b)) for a, b in ((expected, found), (found, expected)))
            faults += [f"{model_class.__name__}: missing {outline(missing)}"] if missing else []
            faults += [f"{model_class.__name__}: not a target {outline(extra)}"] if extra else []
        else:
            counts = Counter(re.sub(r"\b\d+\b", "N", fault) for fault in faults_of(model, found))
            faults += [f"{model_class.__name__}: {fault} ({count} times)" for fault, count in counts.items()]
    return has_blocks, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them by default")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
    measured = json.loads(MEASURED.read_text())
    right, wrong, unmeasured = [], {}, 0
    for model_type in args.types or sorted(CONFIG_MAPPING):
        has_blocks, faults = judge(model_type, measured, verbose=bool(args.types))
        if faults:
            wrong[model_type] = faults
        elif has_blocks:
            right.append(model_type)
        unmeasured += has_blocks and model_type not in measured
    total = len(right) + len(wrong)
    for model_type, faults in wrong.items():
        print(f"wrong: {model_type}", *faults, sep="\n    ")
    print(f"transformers {transformers.__version__}: {total} model types with transformer blocks,", end=" ")
    print(f"{total - unmeasured} of them measured; {len(right)} right, {len(wrong)} wrong:", end=" ")
    print(f"{100 * len(right) / max(total, 1):.1f} % right")
    sys.exit(bool(wrong) and bool(args.types))


if __name__ == "__main__":
    main()
