"""Loading READ's and LSTTA's adapters by PEFT and by transformers: as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from peft import PeftConfig, PeftModel, PeftType, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from .fitting import PEFT_PREFIX, UNRELATED, differing_fields
from .inner import check_inner_adapters_are_there, inner_adapters_loaded, inner_adapters_reloaded
from .layer import AdapterLayer
from .offloading import as_it_is_dispatched
from .overrides import override
from .undo import undone_on_failure


DOWNLOAD = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
# Fields of a configuration that decide which weights there are, or how they are trained.
STRUCTURE = {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
STRUCTURE |= {"modules_to_save", "init_weights", "dropout", "inner_adapters", "active_inner_adapters"}
# PEFT's `from_pretrained` calls `load_adapter` with the model that it has just made.
_IN_FROM_PRETRAINED: ContextVar[bool] = ContextVar("in_from_pretrained", default=False)


def install() -> None:
    """Take the places where PEFT and transformers load an adapter; harmless when called again.

    Raises:
        ImportError: if PEFT or transformers no longer has one of the places.
    """
    purpose = "loads adapters"
    override(PeftModel, "from_pretrained", _from_pretrained, _is_ours_for_peft, purpose)
    override(PeftModel, "load_adapter", _load_adapter, _is_ours_for_peft, purpose)
    override(PeftAdapterMixin, "load_adapter", _load_adapter_of_transformers, _is_ours_for_transformers, purpose)


def is_ours(config: object) -> bool:
    """Whether a configuration, or the name of a method, is READ's or LSTTA's."""
    return getattr(config, "peft_type", config) in (PeftType["READ"], PeftType["LSTTA"])


def _from_pretrained(load: Callable[[], PeftModel], arguments: dict[str, Any]) -> PeftModel:
    """Load into a base model, which is as it was if the adapter is refused."""
    base = arguments["model"]
    config, download = _saved_config(arguments)
    with (
        undone_on_failure(base),
        as_it_is_dispatched(base),
        inner_adapters_loaded(base, arguments["model_id"], config, download, arguments["is_trainable"]),
    ):
        token = _IN_FROM_PRETRAINED.set(True)
        try:
            return load()
        finally:
            _IN_FROM_PRETRAINED.reset(token)


def _saved_config(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration that PEFT is told to load, and the arguments of its download."""
    download = {name: value for name, value in arguments["kwargs"].items() if name in DOWNLOAD and value is not None}
    return arguments.get("config") or PeftConfig.from_pretrained(arguments["model_id"], **download), download


def _load_adapter(load: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    """Load one more adapter, or an adapter's weights anew, as a Trainer does that resumes."""
    model: PeftModel = arguments["self"]
    name, source, base = arguments["adapter_name"], arguments["model_id"], model.get_base_model()
    with _missing_keys_named(name), undone_on_failure(model), as_it_is_dispatched(base):
        if _IN_FROM_PRETRAINED.get():
            return load()
        config, download = _saved_config(arguments)
        if name in model.peft_config:
            _check_computes_the_same(name, model.peft_config[name], config)
            with inner_adapters_reloaded(base, source, config, download):
                return load()
        check_inner_adapters_are_there(base, source, config, download)
        return load()


def _check_computes_the_same(name: str, there: PeftConfig, saved: PeftConfig) -> None:
    """Refuse weights of an adapter that computes something else with them; which ones there are, the weights tell."""
    wrong = differing_fields(there, saved, lambda field: field not in UNRELATED | STRUCTURE)
    if wrong:
        more = ", ".join(f"{field}={getattr(saved, field, None)!r}" for field in wrong)
        raise ValueError(
            f"The model has an adapter {name!r} already, of another configuration than the saved one ({more}), so "
            "nothing was loaded. Load it under a name of its own."
        )


@contextmanager
def _missing_keys_named(adapter_name: str) -> Iterator[None]:
    """Say what a KeyError means: PEFT looks up the weights of `modules_to_save` by their keys."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"The weights don't fit adapter {adapter_name!r}, so nothing was loaded:\n  missing: "
            f"{error.args[0] if error.args else error}"
        ) from error


def _load_adapter_of_transformers(_: Callable[[], Any], arguments: dict[str, Any]) -> LoadStateDictInfo:
    """What transformers' `load_adapter` does, with PEFT's loading of weights, which is strict for our methods."""
    model, name = arguments["self"], arguments["adapter_name"] or "default"
    if arguments["hotswap"] is True:
        raise ValueError("READ and LSTTA can't be hot-swapped: load the adapter under a name of its own.")
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
    source, download = _source(arguments)
    config = arguments["peft_config"]
    if config is None:
        config = PeftConfig.from_pretrained(source, **download)
    config.inference_mode = not arguments["is_trainable"]
    weights = arguments["adapter_state_dict"]
    if weights is None:
        weights = load_peft_weights(source, device="cpu", **download)
    # PEFT 0.21.0 looks up modules that are saved beside by their names in this model.
    weights = {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
    low = arguments["low_cpu_mem_usage"]
    if not config.inner_adapters:
        around: AbstractContextManager[None] = nullcontext()
    elif source is None:
        raise ValueError("The adapter was saved with others inside of the model: load it from its folder.")
    elif getattr(model, "peft_config", None):
        check_inner_adapters_are_there(model, source, config, download)
        around = nullcontext()
    else:
        around = inner_adapters_loaded(model, source, config, download, arguments["is_trainable"])
    with _missing_keys_named(name), undone_on_failure(model), around:
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=low)
        set_peft_model_state_dict(model, weights, name, low_cpu_mem_usage=low)
        model._hf_peft_config_loaded = True
        if config.inference_mode:
            model.eval()
            for module in model.modules():
                if isinstance(module, AdapterLayer):
                    module.requires_grad_(False)
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _is_ours_for_peft(arguments: dict[str, Any]) -> bool:
    config = arguments.get("config")
    if config is None:
        config = _peft_type(arguments["model_id"], arguments["kwargs"])
    return is_ours(config)


def _is_ours_for_transformers(arguments: dict[str, Any]) -> bool:
    if arguments["peft_config"] is not None:
        return is_ours(arguments["peft_config"])
    source, download = _source(arguments)
    return source is not None and is_ours(_peft_type(source, download))


def _source(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Where transformers is told to load an adapter from, and how."""
    load_config = arguments["load_config"]
    download = dict(getattr(load_config, "download_kwargs", None) or {})
    download |= arguments["kwargs"].get("download_kwargs") or {}
    download |= {name: value for name, value in arguments["kwargs"].items() if name in DOWNLOAD}
    download |= arguments["adapter_kwargs"] or {}
    if arguments["local_files_only"]:
        download["local_files_only"] = True
    source = arguments["peft_model_id"] or getattr(load_config, "pretrained_model_name_or_path", None)
    return source, {name: value for name, value in download.items() if name in DOWNLOAD and value not in (None, "")}


def _peft_type(source: Any, download: Mapping[str, Any]) -> Any:
    """The method that a saved configuration names; None if it can't be read, which the load itself will tell."""
    try:
        return PeftConfig._get_peft_type(source, **{n: v for n, v in download.items() if n in DOWNLOAD})
    except Exception:  # whatever it is
        return None
