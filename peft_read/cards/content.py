"""What the card of an adapter says, gathered from the model, from the saved files and from what its trainer told."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, PeftType
from safetensors import safe_open

import peft_read

from ..trimodal.modeling import TrimodalModel
from ..tuners.layer import AdapterLayer
from .base import Base, base_of
from .page import Page, listed


WEIGHTS = "adapter_model.safetensors"
# Of a configuration's fields, those that say where an adapter sits and how it starts, not what it is.
PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers"}
PLACES |= {"modules_to_save", "init_weights"}
ALWAYS_SHOWN = {"r", "cell", "num_heads", "window"}


@dataclass(frozen=True)
class Facts:
    """What weights and configuration don't tell.

    Attributes:
        data: sentences on what the adapter was trained and evaluated on, in Markdown.
        unnamed_data: the same where nobody has named the data.
        results: evaluations on a named data set.
        metrics: other metrics of an evaluation, by name.
        training: hyperparameters, by name.
        metadata: fields of the card's metadata.
    """

    data: str | None = None
    unnamed_data: str | None = None
    results: list[EvalResult] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class Saved(NamedTuple):
    """The weights of an adapter in its file, those of whole modules beside it, and the file's size in bytes."""

    adapter: int
    modules: int
    size: int


def generate(model: PeftModel, folder: Path, repo_id: str | None, facts: Facts) -> tuple[Page, set[str]]:
    """The card of the adapters that are saved in a folder.

    Args:
        model: the model with its adapters.
        folder: where they are saved, or will be.
        repo_id: the repository on the Hub to which they are pushed, if there is one.
        facts: what else is known.

    Returns:
        The card, and which of its parts only fill a gap: they say that something isn't known, or are about this
        process, which needn't be the one that trained.
    """
    saved = {name: _saved(folder, name, config) for name, config in model.peft_config.items()}
    if any(saved.values()):  # `save_pretrained` may have been told to save some of them only
        saved = {name: numbers for name, numbers in saved.items() if numbers}
    configs = {name: model.peft_config[name] for name in saved}
    method = _method(next(iter(configs.values())))
    given = facts.metadata.get("base_model")
    base = base_of(model, given if isinstance(given, str) else None)
    title = facts.metadata.get("model_name") or (repo_id.split("/")[-1] if repo_id else folder.resolve().name)
    fields: dict[str, Any] = {
        "library_name": "peft",
        "base_model": base.ids[0] if len(base.ids) == 1 else base.ids or None,
        "pipeline_tag": base.task,
    }
    fields |= {name: value for name, value in facts.metadata.items() if name != "model_name"}
    fields["tags"] = _tags(model, method, base, fields)
    if facts.results:
        fields |= {"model_name": title, "eval_results": facts.results}
    card = ModelCard.from_template(
        ModelCardData(**fields),
        template_path=str(templates() / f"{method}.md"),
        model_name=title,
        several=len(configs) > 1,
        base=base.sentence,
        snippet=_snippet(model, base, method, repo_id or folder.resolve().name, list(configs)),
        adapters=_adapters(model, configs, saved),
        data=facts.data or facts.unnamed_data,
        results=_results(facts),
        training=_table(("hyperparameter", "value"), facts.training.items()),
        versions=_versions(model),
    )
    known = {"## Data": facts.data, "## Results": facts.results or facts.metrics, "## Training": facts.training}
    unsure = {heading for heading, value in known.items() if not value}
    if not any(parameter.requires_grad for parameter in model.parameters()):
        unsure.add("## Versions")
    return Page.parse(str(card)), unsure


def templates() -> Path:
    """The folder of the cards' templates: in an installed package inside it, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "hub_cards"
    return inside if inside.is_dir() else package.parent / "hub_cards"


def _method(config: PeftConfig) -> str:
    return PeftType(config.peft_type).value.lower()


def _modules_to_save(config: PeftConfig) -> list[str]:
    return sorted(getattr(config, "modules_to_save", None) or ())


def _saved(folder: Path, name: str, config: PeftConfig) -> Saved | None:
    """What an adapter's file holds, None if there is none."""
    path = (folder if name == "default" else folder / name) / WEIGHTS
    if not path.is_file():
        return None
    counts = {True: 0, False: 0}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (no mapping)
            counts[f".{_method(config)}_" in key] += torch.Size(file.get_slice(key).get_shape()).numel()
    return Saved(counts[True], counts[False], path.stat().st_size)


def _tags(model: PeftModel, method: str, base: Base, fields: Mapping[str, Any]) -> list[str]:
    """PEFT's tags, but for a base that isn't on the Hub; the method; and those that somebody gave."""
    tags = {method, *listed(fields.get("tags")), *listed(getattr(model, "model_tags", None))}
    tags |= {tag for tag in model._get_peft_specific_model_tags() if not tag.startswith("base_model:")}
    return sorted(tags | {f"base_model:adapter:{hub_id}" for hub_id in base.ids})


def _snippet(model: PeftModel, base: Base, method: str, source: str, names: list[str]) -> str:
    """Markdown with the code that loads the adapters, and what it needs."""
    known = f"import peft_read  # makes {method.upper()} known to PEFT"
    lines = [known, "from peft import PeftModel", *filter(None, [base.imports]), "", base.code]
    places = [
        f'"{source}"' if name == "default" else f'"{source}", subfolder="{name}", adapter_name="{name}"'
        for name in names
    ]
    lines.append(f"model = PeftModel.from_pretrained(base_model, {places[0]})")
    lines += [f"model.load_adapter({place})" for place in places[1:]]
    text = "\n".join(["```python", *lines, "```"])
    text += (
        f"\n\nWithout `import peft_read`, PEFT doesn't know the method and stops with `KeyError: '{method.upper()}'`. "
        "The import is the line that mends it; it needs the package peft-read."
    )
    if not base.ids and "path/to" in base.code:
        text += (
            "\n\nPut the path of the base model in place of `path/to/...`: only who trained the adapter can name it."
        )
    missing = _untrained_parts(model)
    if missing:
        text += (
            f"\n\nThe base model's {' and '.join(f'`{name}`' for name in missing)} started at random and aren't in "
            "this adapter: load the base from where it was saved."
        )
    return text


def _untrained_parts(model: PeftModel) -> list[str]:
    """What joins the towers of a composite that was made of towers, where that isn't saved with the adapter."""
    base = model.get_base_model()
    if not isinstance(base, TrimodalModel) or base.name_or_path:
        return []
    saved = {name for config in model.peft_config.values() for name in _modules_to_save(config)}
    parts = [*base.new_parts, *(part for tower in base.towers().values() for part in getattr(tower, "new_parts", ()))]
    return [name for name in dict.fromkeys(parts) if name not in saved]


def _adapters(model: PeftModel, configs: Mapping[str, PeftConfig], saved: Mapping[str, Saved | None]) -> str:
    """A table with a row for each adapter."""
    total = model.get_nb_trainable_parameters()[1]
    rows = []
    for name, config in configs.items():
        numbers = saved[name]
        weights, size = "unknown", "unknown"
        if numbers is not None:
            share = (numbers.adapter + numbers.modules) / total
            weights = f"{numbers.adapter + numbers.modules:,} ({share:.2%} of the model)"
            if numbers.modules:
                beside = ", ".join(f"`{module}`" for module in _modules_to_save(config)) or "others"
                weights += f", of them {numbers.modules:,} in {beside}"
            size = f"{numbers.size / 1024:,.0f} KiB" if numbers.size < 2**20 else f"{numbers.size / 2**20:,.1f} MiB"
        layers = sum(
            name in getattr(module, module.adapter_layer_names[0])
            for module in model.modules()
            if isinstance(module, AdapterLayer)
        )
        rows.append((f"`{name}`", _settings(config), layers, weights, size))
    return _table(("adapter", "settings", "adapted modules", "trainable parameters", "size on disk"), rows)


def _settings(config: PeftConfig) -> str:
    """The method's own fields that matter, as code."""
    inherited = {each.name for each in dataclasses.fields(PeftConfig)} | PLACES
    own = [each for each in dataclasses.fields(config) if each.name not in inherited]
    values = {each.name: getattr(config, each.name) for each in own}
    defaults = {each.name: getattr(type(config)(), each.name) for each in own}
    shown = {name: v for name, v in values.items() if name in ALWAYS_SHOWN or v != defaults[name]}
    return ", ".join(f"`{name}={value!r}`" for name, value in shown.items())


def _results(facts: Facts) -> str:
    """Tables of the results and of the other metrics."""
    rows = [
        (each.dataset_name, each.dataset_split or "", each.metric_name or each.metric_type, each.metric_value)
        for each in facts.results
    ]
    tables = [_table(("data", "split", "metric", "value"), rows)]
    tables.append(_table(("metric on the evaluation set", "value"), facts.metrics.items()))
    return "\n\n".join(filter(None, tables))


def _versions(model: PeftModel) -> str:
    """The libraries and the device of this process."""
    device = next(model.parameters()).device
    on = f"{device.type.upper()}, {os.cpu_count()} cores, {platform.machine()}"
    if device.type == "cuda":
        on = torch.cuda.get_device_name(device)
    libraries = [(name, version(name)) for name in ("peft", "transformers", "accelerate", "torch")]
    python = ("Python", platform.python_version())
    return _table(("", "version"), [("peft-read", peft_read.__version__), *libraries, python, ("hardware", on)])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; an empty text if there are no rows."""
    lines = [" | ".join(_cell(value) for value in row) for row in rows]
    if not lines:
        return ""
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join(["---"] * len(head)), *lines))


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
