"""The tuner of READ: puts its layers into a model, and refuses what it can't do before it touches anything."""

from __future__ import annotations

import warnings
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures.exceptions import NO_TIME_AXIS, TIME_FIRST
from ..architectures.targets import attention_beside, block_index, default_targets, is_causal, owner_of
from ..forward.context import ForwardContext
from ..forward.frames import is_packed, takes_grid
from ..tuners.base import AdapterTuner
from ..tuners.checks import check_width, shown
from .config import ReadConfig
from .layer import ReadLayer, ReadLinear, ReadLinearOfTorch


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


class ReadModel(AdapterTuner):
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

    def _check_blocks(self, config: ReadConfig) -> None:
        """Refuse indices of blocks that aren't there."""
        wanted = config.layers_to_transform
        if wanted is None:
            return
        found = (block_index(f"{name}.", config.layers_pattern) for name, _ in self.model.named_modules())
        there = {index for index in found if index is not None}
        gone = sorted(set([wanted] if isinstance(wanted, int) else wanted) - there)
        if gone:
            raise ValueError(
                f"`layers_to_transform` names the blocks {shown(gone)}, which aren't there; the blocks found have the "
                f"indices {shown(sorted(there))}."
            )

    def _prepare_model(self, peft_config: ReadConfig, model: nn.Module) -> None:
        """Look at every target before the first one is wrapped."""
        self._check_blocks(peft_config)
        config = cast(ReadConfig, _maybe_include_all_linear_layers(peft_config, model))
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._check_target_module_exists(config, name):
                self._check_target(name, module, config)
        self._check_names_to_save(config, model)

    def _check_target(self, name: str, module: nn.Module, config: ReadConfig) -> None:
        self._check_place(name, module)
        if isinstance(module, ReadLayer):
            module = module.get_base_layer()
        width = self._width(name, module)
        if width is None:
            raise ValueError(
                f"READ can't adapt {name}, a {type(module).__name__}: it needs a module whose output ends in the "
                "feature dimension, such as the last linear layer of a feed-forward block."
            )
        check_width(name, *self._rank(name, config), width)
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"READ can't adapt {name}: torch's nn.MultiheadAttention reads the weights of this module and never "
                "calls it. Target the feed-forward part of the block."
            )
        if config.cell != "none":
            self._check_time_axis(name)
            self._check_frames(name, config)
        if config.bidirectional and is_causal(owner_of(self.model, name)):
            raise ValueError(
                f"`bidirectional=True` is for encoders, but {name} is in a decoder, where it would show every token "
                "its future. Leave it out, or target the encoder alone."
            )

    def _check_time_axis(self, name: str) -> None:
        """Refuse modules whose outputs are (time, batch, features)."""
        owner = owner_of(self.model, name)
        model_type = getattr(getattr(owner, "config", None), "model_type", "")
        if NO_TIME_AXIS.get(model_type) == type(owner).__name__:
            raise ValueError(
                f"READ can't adapt {name}: the decoder of a model of type {model_type} has several streams of tokens "
                "one after another along its axis of time. Target the encoder alone, or use cell='none'."
            )
        attention = attention_beside(self.model, name)
        if model_type in TIME_FIRST or any(not module.batch_first for module in attention):
            where = f"a model of type {model_type}" if model_type in TIME_FIRST else "attention with batch_first=False"
            raise ValueError(
                f"READ can't adapt {name}: {where} has its tokens along the first axis and the batch along the "
                "second, over which the recurrence would run. Build torch's layers with batch_first=True, target "
                "other modules, or use cell='none' there."
            )

    def _check_frames(self, name: str, config: ReadConfig) -> None:
        """Refuse recurrences over what isn't one sequence or one video."""
        over_frames, tells = config.recur_over == "frames", takes_grid(owner_of(self.model, name))
        if is_packed(self.model, name) and not (tells and over_frames):
            mend = "Set `recur_over='frames'`, which runs over the frames of each video by itself; l" if tells else "L"
            raise ValueError(
                f"READ can't recur over the rows of {name}: in this tower those of all samples lie in one axis, so "
                f"that the recurrence would run from one into the next. {mend}eave the tower out "
                "(`exclude_modules`), or use cell='none' there."
            )
        if over_frames and tells and config.num_frames is not None:
            raise ValueError(
                f"`num_frames={config.num_frames}` isn't for {name}: its tower is told how many frames each video "
                "has. Leave it out; `recur_over='frames'` is enough."
            )
        if over_frames and not tells and config.num_frames is None:
            raise ValueError(
                f"`recur_over='frames'` needs `num_frames`, the number of frames per video, at {name}: only towers "
                "that take `grid_thw`, such as Qwen-VL's, are told it themselves."
            )

    def _width(self, name: str, module: nn.Module) -> int | None:
        """Size of the last dimension of a module's output, None if it can't have one or can't be told."""
        if isinstance(module, UNFIT):
            return None
        if isinstance(module, nn.Linear | Conv1D):
            width = _get_in_out_features(module)[1]
        else:  # that a layer is of an unusual type is for us to judge
            with warnings.catch_warnings():  # which makes Python show again what it has shown: not where there is none
                warnings.simplefilter("ignore")
                width = _get_in_out_features(module)[1]
        if width is None:
            config = getattr(owner_of(self.model, name), "config", None)
            width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        return width

    def _rank(self, name: str, config: ReadConfig) -> tuple[str, int]:
        """Which field says how wide the bottleneck at a module is, and how wide."""
        ranks = config.rank_pattern or {}
        pattern = get_pattern_key(list(ranks), name)
        return (f"rank_pattern[{pattern!r}]", ranks[pattern]) if pattern in ranks else ("r", config.r)

    def _wrap(self, module: nn.Module, parent: nn.Module, config: ReadConfig, name: str) -> ReadLayer:
        self._check_target(name, module, config)  # `state_dict` may name modules that the config doesn't
        width = self._width(name, module)
        assert width is not None
        layer_cls = ReadLinear if isinstance(module, (nn.Linear, Conv1D)) else ReadLayer
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer_cls = ReadLinearOfTorch
        owner = owner_of(self.model, name)
        context = ForwardContext.attach(owner, causal=is_causal(owner))
        around = self._contexts_around(name) if config.recur_over == "frames" else ()
        packed = self._packed(owner, name)
        return layer_cls(module, width, context, name, context.watch(owner, module), around, packed)

    def _update(self, layer: ReadLayer, adapter_name: str, config: ReadConfig, name: str) -> None:
        layer.update_layer(adapter_name, self._rank(name, config)[1], config)

    def _packed(self, owner: nn.Module, name: str) -> int | None:
        """Patches of a frame that a packed tower merges into one at its end; None if the module isn't in one."""
        if not is_packed(self.model, name):
            return None
        return int(getattr(getattr(owner, "config", None), "spatial_merge_size", 1)) ** 2

    def _contexts_around(self, name: str) -> list[ForwardContext]:
        """Of the transformers models around a module, the adapted model included."""
        parts = name.split(".")
        paths = [".".join(parts[:i]) for i in range(len(parts))]
        models = (self.model.get_submodule(path) for path in paths)
        return [ForwardContext.attach(m, causal=is_causal(m)) for m in models if isinstance(m, PreTrainedModel)]

    def unload(self) -> nn.Module:
        """The base model as it was, without the adapters."""
        model = super().unload()
        for module in model.modules():
            ForwardContext.detach(module)
        return model

    def _layer_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The number of rows that `generate` makes of each sample."""
        return {"beams": self._beams(arguments)}
