"""What the methods of this package have in common as methods of PEFT that can't be merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from .sharding import blocks_to_shard, embeddings_are_a_unit


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer around any module: it forwards what it doesn't know to the module, and refuses to be merged."""

    cannot_merge: str

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, with the method's reason."""
        raise NotImplementedError(self.cannot_merge)

    def unmerge(self) -> None:
        """Refuse: nothing can have been merged."""
        raise NotImplementedError(self.cannot_merge)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The one isn't there yet while the layer is built or unpickled; by the other, of a checkpoint around the
            # module, Accelerate would take this layer for the module.
            if name in ("base_layer", "_checkpoint_wrapped_module"):
                raise
            # Models read attributes of their parts; T5 looks at `wo.weight.dtype`.
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # a block of modules, which has no weight of its own
            parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
            device, dtype = (None, None) if parameter is None else (parameter.device, parameter.dtype)
        hook = getattr(base_layer, "_hf_hook", None)
        if device is not None and device.type == "meta" and hook is not None:  # offloaded: not where its weights lie
            device = torch.device(hook.execution_device)
        return device, dtype


def _is_fsdp() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def _nothing() -> None:
    return None


class AdapterTuner(BaseTuner):
    """A tuner whose weights load strictly, whose batches may mix adapters, and which refuses to be merged."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: dict[str, list[str]] = {}

    @property
    def _no_split_modules(self) -> list[str] | set[str] | None:
        """Class names of the blocks that FSDP wraps, where transformers, PEFT and Accelerate look for them."""
        if not _is_fsdp():
            return self.model._no_split_modules  # which a device map goes by as well
        layers = (module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls))
        return blocks_to_shard(self.model, layers)

    @property
    def get_input_embeddings(self) -> Callable[[], nn.Module | None]:
        """The model's own, but for FSDP if the embeddings can't be sharded by themselves, as Accelerate tries to."""
        getter = self.model.get_input_embeddings
        return _nothing if _is_fsdp() and not embeddings_are_a_unit(self.model) else getter

    @property
    def get_output_embeddings(self) -> Callable[[], nn.Module | None]:
        """Likewise: the head may share their weight."""
        getter = self.model.get_output_embeddings
        return _nothing if _is_fsdp() and not embeddings_are_a_unit(self.model) else getter

    def _refuse_name(self, name: str) -> NoReturn:
        method = self.prefix.removesuffix("_").upper()
        raise ValueError(
            f"{method} can't adapt {name}: PEFT and transformers tell {method}'s weights by '{self.prefix}' in their "
            "names and would mistake this module's own for them. Rename the module, or leave it out."
        )

    def _check_names_to_save(self, config: PeftConfig, model: nn.Module) -> None:
        """Refuse modules to save that would be mistaken for adapters."""
        saved = tuple(getattr(config, "modules_to_save", None) or ())
        if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            saved += tuple(SEQ_CLS_HEAD_NAMES)  # which PEFT adds for these tasks
        for name, _ in model.named_modules():
            if saved and name.endswith(saved) and self.prefix in name:
                self._refuse_name(name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's selection, without the weights of other methods' layers in the same model."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        others = tuple(
            f"{name}.{part}.".removeprefix("_fsdp_wrapped_module.")
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and not isinstance(module, cls.tuner_layer_cls)
            for part in (*module.adapter_layer_names, *module.other_param_names)
        )
        return {key: value for key, value in selected.items() if not key.startswith(others)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, after which nothing may be missing, left over or of another shape.

        Runs before anything is copied, so a file that doesn't fit leaves the model as it was.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        in_model = model.state_dict()
        given = {key if key in in_model else key.removeprefix("base_model.model."): v for key, v in remapped.items()}
        names = {
            f"{module_name}.{part}.{adapter_name}."
            for module_name, module in model.named_modules()
            if isinstance(module, cls.tuner_layer_cls)
            for part in module.adapter_layer_names
        }
        names = {name.removeprefix("_fsdp_wrapped_module.") for name in names}
        ours = [key for key in in_model if any(key.startswith(name) for name in names)]
        faults = [f"missing: {key}" for key in ours if key not in given]
        faults += [f"unexpected: {key}" for key in given if key not in in_model]
        faults += [
            f"wrong shape: {key}: {tuple(given[key].shape)} in the file, {tuple(in_model[key].shape)} in the model"
            for key in ours
            if key in given and given[key].shape != in_model[key].shape
        ]
        if faults:
            shown = "\n  ".join(faults[:10]) + (f"\n  and {len(faults) - 10} more" if len(faults) > 10 else "")
            raise ValueError(
                f"The weights don't fit adapter {adapter_name!r}, so nothing was loaded. They may belong to another "
                f"base model (the adapter names {config.base_model_name_or_path!r}) or another configuration:\n"
                f"  {shown}"
            )
        return remapped

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Refuse, with the method's reason."""
        self._check_merge_allowed()

    def _layer_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What layers are told beside `adapter_names` of a call of the model with these arguments."""
        return {}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inference with an adapter per row: `adapter_names` reaches every layer for the time of this forward."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        for_layers = self._layer_arguments(kwargs)
        if self.training:
            raise ValueError("`adapter_names` is for inference: call `model.eval()` first.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"`adapter_names` names adapters that aren't there: {unknown}; there are {sorted(self.peft_config)}, "
                "and '__base__' for none."
            )
        thread = threading.get_ident()

        def pass_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            # Another thread may run the same model with names of its own, and torch is already calling the hook there
            # before it has noted that it takes keyword arguments.
            if kwargs is None or threading.get_ident() != thread:
                return None
            more = for_layers if isinstance(module, self.tuner_layer_cls) else {}
            return args, kwargs | {"adapter_names": adapter_names} | more

        handles = [
            module.register_forward_pre_hook(pass_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
