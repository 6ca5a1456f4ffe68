"""The tuner of READ: puts its layers into a model, and refuses what it can't do before it touches anything."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import ReadConfig
from .context import ForwardContext
from .layer import CANNOT_MERGE, ReadLayer, ReadLinear
from .targets import block_index, default_targets, is_causal, owner_of


# Their outputs don't end in features, come with others of another meaning, or they are never called.
UNFIT = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.ModuleDict,
    nn.ModuleList,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.modules.conv._ConvNd,
)
# By the `model_type` of the model that owns a module: outputs are (time, batch, features).
TIME_FIRST = ("bridgetower", "bridgetower_vision_model", "mask2former", "oneformer", "xlnet")


class ReadModel(BaseTuner):
    """Adds READ's recurrent adapters to a model (Nguyen et al., AAAI 2024, arXiv 2312.06950).

    Usually made by `get_peft_model(model, ReadConfig(...))`. Everything that the layers need at run time lives on them
    and on the model, nothing here, so that `inject_adapter_in_model` and transformers' `add_adapter` work as well.

    Args:
        model: the model to adapt; a transformers model or any module.
        peft_config: the configuration, or one per adapter name.
        adapter_name: name of the adapter to add.
        low_cpu_mem_usage: make the adapter's weights on the meta device, to be loaded later.
        state_dict: adapt the modules that these keys name, rather than those that the configuration names.

    Raises:
        ValueError: if a target can't be adapted; the message names it.
    """

    prefix: str = "read_"
    tuner_layer_cls = ReadLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: ReadConfig, model_config: dict[str, Any]) -> ReadConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self._default_targets(peft_config))  # type: ignore[assignment]
        return peft_config

    def _default_targets(self, config: ReadConfig) -> list[str]:
        found = default_targets(self.model)
        if not found:
            raise ValueError(
                f"READ knows no default targets in a {type(self.model).__name__}: set `target_modules` to the modules "
                "that end the feed-forward part of each block, for example ['mlp.down_proj']."
            )
        wanted = config.layers_to_transform
        if wanted is None or wanted == []:
            return found
        index_of = {name: block_index(name, config.layers_pattern) for name in found}
        chosen = [name for name in found if index_of[name] in ([wanted] if isinstance(wanted, int) else wanted)]
        if not chosen:
            raise ValueError(
                f"`layers_to_transform={wanted}` leaves nothing to adapt; the blocks found have the indices "
                f"{sorted({index for index in index_of.values() if index is not None})}."
            )
        return chosen

    def _prepare_model(self, peft_config: ReadConfig, model: nn.Module) -> None:
        """Look at every target before the first one is wrapped."""
        config = cast(ReadConfig, _maybe_include_all_linear_layers(peft_config, model))
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._check_target_module_exists(config, name):
                self._check_target(name, module, config)
        saved = tuple(config.modules_to_save or ())
        if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            saved += tuple(SEQ_CLS_HEAD_NAMES)  # which PEFT adds for these tasks
        for name, _ in model.named_modules():
            if saved and name.endswith(saved) and self.prefix in name:
                self._refuse_name(name)

    def _check_target(self, name: str, module: nn.Module, config: ReadConfig) -> None:
        if self.prefix in name:
            self._refuse_name(name)
        if isinstance(module, ReadLayer):
            module = module.get_base_layer()
        elif isinstance(module, BaseTunerLayer):
            raise ValueError(f"READ can't wrap {name}, which is adapted by {type(module).__module__} already.")
        if self._width(name, module) is None:
            raise ValueError(
                f"READ can't adapt {name}, a {type(module).__name__}: it needs a module whose output ends in the "
                "feature dimension, such as the last linear layer of a feed-forward block."
            )
        model_type = getattr(getattr(owner_of(self.model, name), "config", None), "model_type", None)
        if config.cell != "none" and model_type in TIME_FIRST:
            raise ValueError(
                f"READ can't adapt {name}: a model of type {model_type} has its tokens along the first axis and the "
                "batch along the second, over which the recurrence would run. Use cell='none' there."
            )
        if config.bidirectional and is_causal(owner_of(self.model, name)):
            raise ValueError(
                f"`bidirectional=True` is for encoders, but {name} is in a decoder, where it would show every token "
                "its future. Leave it out, or target the encoder alone."
            )

    def _refuse_name(self, name: str) -> NoReturn:
        raise ValueError(
            f"READ can't adapt {name}: PEFT and transformers tell READ's weights by '{self.prefix}' in their names "
            "and would mistake this module's own for them. Rename the module, or exclude it with `exclude_modules`."
        )

    def _width(self, name: str, module: nn.Module) -> int | None:
        """Size of the last dimension of a module's output, None if it can't have one or can't be told."""
        if isinstance(module, UNFIT):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a layer is of an unusual type is for us to judge
            width = _get_in_out_features(module)[1]
        if width is None:
            config = getattr(owner_of(self.model, name), "config", None)
            width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        return width

    def _create_and_replace(
        self,
        peft_config: ReadConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = peft_config.rank_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), current_key), peft_config.r)
        if isinstance(target, ReadLayer):
            target.update_layer(adapter_name, r, peft_config)
            return
        self._check_target(current_key, target, peft_config)  # `state_dict` may name modules that the config doesn't
        width = self._width(current_key, target)
        assert width is not None
        layer_cls = ReadLinear if isinstance(target, (nn.Linear, Conv1D)) else ReadLayer
        owner = owner_of(self.model, current_key)
        context = ForwardContext.attach(owner)
        layer = layer_cls(target, width, context, current_key, part=context.watch(owner, target))
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, r, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ReadConfig, adapter_name: str, state_dict: dict[str, Tensor]
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
            if isinstance(module, ReadLayer)
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
        raise NotImplementedError(CANNOT_MERGE)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Refuse: a recurrence can't be folded into a matrix."""
        self._check_merge_allowed()

    def unload(self) -> nn.Module:
        """The base model as it was, without the adapters."""
        model = super().unload()
        for module in model.modules():
            ForwardContext.detach(module)
        return model

    def _beams(self, arguments: dict[str, Any]) -> int:
        """Rows that `generate` makes of each sample."""
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
        beams = self._beams(kwargs)
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
            rows = {"beams": beams} if isinstance(module, ReadLayer) else {}
            return args, kwargs | {"adapter_names": adapter_names} | rows

        handles = [
            module.register_forward_pre_hook(pass_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (ReadLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
