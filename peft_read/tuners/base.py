"""What the tuners of this package have in common as methods of PEFT that can't be merged."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from accelerate.utils import parse_flag_from_env
from peft import LoraModel, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from .checks import check_adapter_name
from .config import AdapterConfig
from .fitting import check_fit
from .layer import AdapterLayer
from .mixed import check_can_be_mixed, mixed_rows, rows_per_sample
from .offloading import bring_trained_modules, check_can_hold_adapters, check_weights_have_values
from .patterns import check_matching
from .sharding import blocks_to_shard, embeddings_are_a_unit
from .undo import undone_on_failure


# What PEFT puts into `modules_to_save` for classifiers and for extractive question answering.
HEAD_NAMES = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")


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

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        ours = self.prefix.removesuffix("_").upper()
        configs = getattr(model, "peft_config", None) or {}
        # Names under which PEFT would put our configuration in the place of another method's.
        self._taken = {name: c.peft_type.value for name, c in configs.items() if c.peft_type.value != ours}
        with undone_on_failure(model):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @property
    def _method(self) -> str:
        return self.prefix.removesuffix("_").upper()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, after which nothing else of the model trains; undone if it is refused.

        PEFT's hooks before and after an injection are none: they run for a tuner's first adapter only.
        """
        config: Any = self.peft_config[adapter_name]
        check_adapter_name(adapter_name)
        with undone_on_failure(model):
            check_matching(config, (name for name, _ in model.named_modules()))
            self._check_trained_modules(model, config)
            self._check_tokens(model, config)
            is_first = not any(isinstance(module, self.tuner_layer_cls) for module in model.modules())
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if is_first:
                self._freeze_base(model)
            bring_trained_modules(model, adapter_name)
            check_weights_have_values(model, self.tuner_layer_cls)
            self._after_injection(model)
            if adapter_name in self._taken:
                method = self._taken[adapter_name]
                raise ValueError(
                    f"A {type(model).__name__} has an adapter {adapter_name!r} of {method} already. To have both, "
                    "inject that one into the part of the model that it adapts: "
                    "`inject_adapter_in_model(config, model.text_model)`, say."
                )

    def _after_injection(self, model: nn.Module) -> None:
        """What a method does once its layers are in the model."""

    @staticmethod
    def _check_trained_modules(model: nn.Module, config: AdapterConfig) -> None:
        """Say which names of modules to train stand for none, but for heads that PEFT adds by the task's type."""
        names = [name for name, _ in model.named_modules()]
        for wanted in config.modules_to_save or ():
            if wanted not in HEAD_NAMES and not any(name.endswith(wanted) for name in names):
                warnings.warn(
                    f"`modules_to_save` names {wanted!r}, which is no module of this {type(model).__name__}: it isn't "
                    "trained.",
                    stacklevel=2,
                )

    @staticmethod
    def _check_tokens(model: nn.Module, config: AdapterConfig) -> None:
        """Refuse tokens to train that the embeddings don't have."""
        wanted = config.trainable_token_indices
        if wanted is None:
            return
        if isinstance(wanted, dict):
            named = [(f".{name}", module) for name, module in model.named_modules()]
            found = [(m, ids) for key, ids in wanted.items() for name, m in named if name.endswith(f".{key}")]
        else:
            getter = getattr(model, "get_input_embeddings", None)
            embeddings = None if getter is None else getter()
            if embeddings is None:
                raise ValueError(
                    f"`trainable_token_indices` needs the input embeddings of a {type(model).__name__}, which doesn't "
                    "name them: give lists of indices by the names of embeddings."
                )
            found = [(embeddings, wanted)]
        for module, indices in found:
            size = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
            if size is not None and max(indices) >= size:
                raise ValueError(
                    f"`trainable_token_indices` names the token {max(indices)}, but there are {size}. New tokens need "
                    "`resize_token_embeddings` first."
                )

    @staticmethod
    def _freeze_base(model: nn.Module) -> None:
        """Freeze what adapters don't own: where there are other methods' layers already, PEFT leaves it as it was."""
        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        owned = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, wrappers)
            for name, parameter in module.named_parameters()
            if not name.startswith(("base_layer.", "original_module."))
        }
        for parameter in model.parameters():
            if id(parameter) not in owned and parameter.requires_grad:
                parameter.requires_grad_(False)

    def _check_place(self, name: str, module: nn.Module) -> None:
        """Refuse a module that can't be wrapped whatever the method does with it."""
        if self.prefix in name:
            self._refuse_name(name)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, self.tuner_layer_cls):
            raise ValueError(
                f"{self._method} can't wrap {name}, which is adapted by {type(module).__module__} already."
            )
        check_can_hold_adapters(self.model, name)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self._update(target, adapter_name, peft_config, current_key)
            return
        self._check_place(current_key, target)
        layer = self._wrap(target, parent, peft_config, current_key)
        layer.set_adapter(self.active_adapters)
        self._update(layer, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _wrap(self, module: nn.Module, parent: nn.Module, config: PeftConfig, name: str) -> AdapterLayer:
        """A layer around a module, without adapters."""
        raise NotImplementedError

    def _update(self, layer: AdapterLayer, adapter_name: str, config: PeftConfig, name: str) -> None:
        """Add an adapter to a layer."""
        raise NotImplementedError

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own moves new weights to where the weight of a linear layer lies. A block has none, and that of an
        # offloaded or 8-bit layer isn't where the layer runs: `settle` has moved them already.
        setattr(parent, child_name, new_module)

    # As LoRA does it: trained embeddings take what is tied to them along.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> NoReturn:
        raise ValueError(
            "`ensure_weight_tying` is for embeddings in `modules_to_save` or `trainable_token_indices`: "
            f"{self._method} can't adapt embeddings, so that an adapter at the head could be tied to none."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: recurrences and attention aren't linear in their weights."""
        raise NotImplementedError(
            f"{self._method}'s adapters can't be combined into one: they aren't linear in their weights. Activate "
            f"several at once, whose changes add up: `model.base_model.set_adapter([...])`."
        )

    def _refuse_name(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self._method} can't adapt {name}: PEFT and transformers tell {self._method}'s weights by "
            f"'{self.prefix}' in their names and would mistake this module's own for them. Rename the module, or "
            "leave it out."
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
        """PEFT's renaming, after which nothing may be missing, left over, of another shape or no number.

        Runs before anything is copied, so a file that doesn't fit leaves the model as it was.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if len(remapped) < len(state_dict):
            twice = next((key for key in state_dict if f".{adapter_name}" in key and key in remapped), "")
            raise ValueError(
                f"The file names a weight twice, so nothing was loaded: {twice}, with and without a prefix or the "
                "adapter's name."
            )
        layers = {
            name: module.adapter_layer_names
            for name, module in model.named_modules()
            if isinstance(module, cls.tuner_layer_cls)
        }
        return check_fit(model, config, adapter_name, remapped, layers)

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Refuse, with the method's reason."""
        self._check_merge_allowed()

    def _layer_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What layers are told beside `adapter_names` of a call of the model with these arguments."""
        return {}

    def _beams(self, arguments: dict[str, Any]) -> int:
        """The number of rows that `generate` makes of each sample."""
        config = arguments.get("generation_config") or getattr(self.model, "generation_config", None)
        names = ("num_beams", "num_return_sequences")
        return max(arguments.get(name) or getattr(config, name, None) or 1 for name in names)

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
        check_can_be_mixed(self, adapter_names)
        multiples = rows_per_sample((*args, *kwargs.values()), len(adapter_names), self._beams(kwargs))
        thread = threading.get_ident()

        def pass_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            # Another thread may run the same model with names of its own, and torch is already calling the hook there
            # before it has noted that it takes keyword arguments.
            if kwargs is None or threading.get_ident() != thread:
                return None
            more = for_layers if isinstance(module, self.tuner_layer_cls) else {}
            return args, kwargs | {"adapter_names": adapter_names} | more

        def take_rows(module: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
            if output is None or threading.get_ident() != thread:
                return None
            return mixed_rows(module, adapter_names, args, kwargs, output, multiples)

        handles = [
            module.register_forward_hook(take_rows, with_kwargs=True)
            if isinstance(module, ModulesToSaveWrapper)
            else module.register_forward_pre_hook(pass_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
