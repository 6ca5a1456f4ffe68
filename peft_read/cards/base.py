"""What a card says of the model that an adapter fits: where it is, and the code that loads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import peft_read

from ..trimodal.features import FeatureTower
from ..trimodal.generation import TrimodalForConditionalGeneration
from ..trimodal.heads import TrimodalForMultipleChoice
from ..trimodal.modeling import TrimodalModel


@dataclass(frozen=True)
class Base:
    """The model that an adapter fits.

    Attributes:
        ids: of the models on the Hub that it consists of; empty if it came from elsewhere.
        sentence: what it is, in Markdown.
        imports: a line of Python that `code` needs, empty if there is none.
        code: Python that loads it as `base_model`.
        task: the Hub's name of its task, None if its class doesn't tell.
    """

    ids: list[str]
    sentence: str
    imports: str
    code: str
    task: str | None


def base_of(model: PeftModel, given: str | None = None) -> Base:
    """The base of an adapted model; `given` is its id on the Hub, where somebody told it."""
    base = model.get_base_model()
    kind, name = type(base).__name__, given or _name(base)
    if not isinstance(base, PreTrainedModel):
        return Base([], f"a `{kind}`", "", _built(kind), None)
    if isinstance(base, TrimodalModel) and not name:
        return _of_towers(base)
    hub_id = hub_id_of(name)
    if hub_id:
        revision = getattr(base.config, "_commit_hash", None)
        sentence = _link(hub_id) + (f" at revision `{revision}`" if revision else "")
    elif name:
        sentence = f"a `{kind}` from a local folder, `{Path(name).name}`, of which this page knows no address"
    else:
        sentence = f"a `{kind}` of which this page knows no address"
    ids = [hub_id] if hub_id else []
    if name not in (given, base.config.name_or_path):  # named by hand, and not what `from_pretrained` gave
        return Base(ids, sentence, "", _built(f"{kind} made of {hub_id or Path(name).name}"), _task(base))
    arguments = [f'"{hub_id or "path/to/base-model"}"']
    if "Classification" in kind and base.config.num_labels != 2:  # transformers' default
        arguments.append(f"num_labels={base.config.num_labels}")
    owner, imports = _import_of(base)
    code = f"base_model = {owner}{kind}.from_pretrained({', '.join(arguments)})"
    return Base(ids, sentence, imports, code, _task(base))


def hub_id_of(name: str) -> str | None:
    """`name` if it can be a model's id on the Hub; None if it is empty, or the path of a folder."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _of_towers(base: TrimodalModel) -> Base:
    """Of a composite that was made of towers and has no name of its own."""
    towers = base.pretrained_parts()
    ids = {modality: hub_id_of(_name(tower)) for modality, tower in towers.items()}
    described = [f"{_described(towers[modality], found)} for {modality}" for modality, found in ids.items()]
    arguments = [f"{modality}={_source(modality, towers[modality], found)}" for modality, found in ids.items()]
    if hasattr(base, "classifier") and not isinstance(base, TrimodalForMultipleChoice):
        arguments.append(f"num_labels={base.config.num_labels}")
    arguments += [
        f"{name}={value!r}"
        for name in ("projection_dim", "pooling")
        if (value := getattr(base.config, name)) != getattr(type(base.config), name)
    ]
    owner, imports = _import_of(base)
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return Base(
        [found for found in ids.values() if found],
        f"a `{type(base).__name__}` of {', '.join(described[:-1])} and {described[-1]}",
        imports,
        f"base_model = {owner}{type(base).__name__}.from_pretrained_towers(\n{lines})",
        _task(base),
    )


def _described(tower: nn.Module, hub_id: str | None) -> str:
    if isinstance(tower, FeatureTower):
        return f"features of size {tower.config.feature_size}"
    return _link(hub_id) if hub_id else f"a local `{type(tower).__name__}`"


def _source(modality: str, tower: nn.Module, hub_id: str | None) -> str:
    """What `from_pretrained_towers` is given for a tower, as code."""
    if isinstance(tower, FeatureTower):
        config = tower.config
        options = f", num_hidden_layers={config.num_hidden_layers}" if config.num_hidden_layers != 1 else ""
        if config.hidden_size != config.feature_size:
            options += f", hidden_size={config.hidden_size}"
        return f'peft_read.FeatureTower.of("{modality}", {config.feature_size}{options})'
    return f'"{hub_id or f"path/to/{modality}-tower"}"'


def _built(what: str) -> str:
    return f"base_model = ...  # the {what}, built as it was for training"


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or "")


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def _import_of(base: PreTrainedModel) -> tuple[str, str]:
    """What stands before the class's name in code, and the line that imports it."""
    kind, module = type(base).__name__, type(base).__module__
    if getattr(peft_read, kind, None) is type(base):
        return "peft_read.", ""
    if getattr(transformers, kind, None) is type(base):
        return "", f"from transformers import {kind}"
    return "", f"from {module} import {kind}  # the base model's own code"


def _task(base: PreTrainedModel) -> str | None:
    """The Hub's name of the task; for a trimodal model with a head, of that which the Hub knows and comes nearest."""
    if isinstance(base, TrimodalModel):
        if isinstance(base, TrimodalForConditionalGeneration):
            return "video-text-to-text" if base.vision_model is not None else "audio-text-to-text"
        if isinstance(base, TrimodalForMultipleChoice):
            return "multiple-choice"
        if not hasattr(base, "classifier"):
            return "feature-extraction"
        return "video-classification" if base.vision_model is not None else "audio-classification"
    name = type(base).__name__
    known = {**TASK_MAPPING, "feature-extraction": MODEL_MAPPING_NAMES}
    for task, classes in cast(dict[str, dict[str, str | tuple[str, ...]]], known).items():
        if any(name in ((each,) if isinstance(each, str) else each) for each in classes.values()):
            return task
    return None
