"""The tuner of LSTTA: puts its layers into the towers of a composite model, and lets them meet."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..architectures.blocks import block_width, blocks_of_levels, find_blocks
from ..architectures.targets import is_causal_language_model
from ..lockstep.composite import find_composite, towers_of
from ..tuners.base import AdapterTuner
from ..tuners.checks import check_width
from .config import LsttaConfig
from .exchange import LsttaExchange
from .layer import LsttaLayer


class _Place(NamedTuple):
    """Where an adapter goes: the tower, the block's name in it, and at which level each of its calls meets."""

    modality: str
    block: str
    levels: dict[int, int]


class LsttaModel(AdapterTuner):
    """Adds LSTTA's adapters to a model of several towers (Liu et al., ACM MM 2023, arXiv 2308.14274).

    Usually made by `get_peft_model(model, LsttaConfig(...))`. Everything that the layers need at run time lives on
    them and on the model, nothing here, so that `inject_adapter_in_model` and transformers' `add_adapter` work too.

    Args:
        model: a `TrimodalModel`, a model that contains one, or a composite of your own that calls its towers through
            `run_towers`.
        peft_config: the configuration, or one per adapter name.
        adapter_name: name of the adapter to add.
        low_cpu_mem_usage: make the adapter's weights on the meta device, to be loaded later.
        state_dict: adapt the modules that these keys name, rather than those that the configuration names.

    Raises:
        ValueError: if the model has no towers that could meet, or a tower's blocks can't be found.
    """

    prefix: str = "lstta_"
    tuner_layer_cls = LsttaLayer

    def get_frame_importance(self, adapter_name: str | None = None) -> tuple[Tensor, ...]:
        """How much each frame counted in the last forward, as the long-term semantic filtering saw it.

        Args:
            adapter_name: of which adapter; the first active one by default.

        Returns:
            For each level, `(batch, time steps)` in [0, 1], detached: 1 for frames that count fully, 0 for padding. A
            time step is what the vision tower's tokens tell apart: a frame, or the frames of a tubelet.

        Raises:
            ValueError: if there is none: no forward with frames was made with that adapter, or it has no frame filter.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        exchange = find_composite(self.model)[1].make_exchange
        if name not in exchange.importance:
            raise ValueError(
                f"There is no frame importance of the adapter {name!r}: the last forward was made without it or "
                "without `pixel_values`, or it has `frame_filter=False`."
            )
        return tuple(exchange.importance[name])

    def _after_injection(self, model: nn.Module) -> None:
        """Let the towers run in lockstep."""
        _, composite = find_composite(model)
        if composite.make_exchange is None:
            composite.make_exchange = LsttaExchange()
        exchange = composite.make_exchange
        exchange.stages = _stages_around_layers(composite)
        text = towers_of(composite).get("text")
        exchange.listeners = {"text"} if text is not None and is_causal_language_model(text) else set()
        if not exchange.runs:
            exchange.watch(composite)

    def _prepare_adapter_config(self, peft_config: LsttaConfig, model_config: dict[str, Any]) -> LsttaConfig:
        """Write down which blocks there are, so that the saved configuration names them."""
        _, composite = find_composite(self.model)
        towers = towers_of(composite)
        for modality, tower in towers.items():
            if isinstance(tower, PeftModel):
                raise ValueError(
                    f"The {modality} tower is a PeftModel, whose arguments can't be told and which isn't saved with "
                    f"LSTTA. Put its adapter into the tower itself: `inject_adapter_in_model(config, "
                    f"model.{modality}_model)`."
                )
        given = peft_config.layers or {}
        for modality in given:
            if modality not in towers:
                raise ValueError(
                    f"The LsttaConfig has `layers` of a {modality} tower, but the {type(composite).__name__} has only "
                    f"{', '.join(towers)}."
                )
        layers = {modality: list(given.get(modality) or find_blocks(tower)) for modality, tower in towers.items()}
        for modality, names in layers.items():
            for name in names:
                _block(towers[modality], modality, name)
        depths = {modality: len(names) for modality, names in layers.items()}
        levels = peft_config.num_levels or min(depths.values())
        if levels > min(depths.values()):
            raise ValueError(
                f"`num_levels={levels}` is more than the shallowest tower has blocks: the towers have {depths}."
            )
        peft_config.layers, peft_config.num_levels = layers, levels
        return peft_config

    def _prepare_model(self, peft_config: LsttaConfig, model: nn.Module) -> None:
        """Look at every block before the first one is wrapped."""
        _, composite = find_composite(model)
        towers = towers_of(composite)
        _warn_of_layerdrop(towers)
        names = {module: name for name, module in model.named_modules()}
        assert peft_config.layers is not None
        assert peft_config.num_levels is not None
        self._places: dict[str, _Place] = {}
        for modality, blocks in peft_config.layers.items():
            for level, index in enumerate(blocks_of_levels(len(blocks), peft_config.num_levels)):
                block = blocks[index]
                call = blocks[:index].count(block)  # of a block that runs several times
                name = names[_block(towers[modality], modality, block)]
                self._places.setdefault(name, _Place(modality, block, {})).levels[call] = level
        for name, place in self._places.items():
            module = model.get_submodule(name)
            if self.prefix in place.block:  # another name of the same block
                self._refuse_name(place.block)
            self._check_place(name, module)
            if not isinstance(module, LsttaLayer):
                check_width(name, "r", peft_config.r, block_width(towers[place.modality], place.block))
        self._check_names_to_save(peft_config, model)

    def _check_target_module_exists(self, peft_config: LsttaConfig, key: str) -> bool:
        return key in self._places

    def _wrap(self, module: nn.Module, parent: nn.Module, config: LsttaConfig, name: str) -> LsttaLayer:
        place = self._places[name]
        tower = towers_of(find_composite(self.model)[1])[place.modality]
        return LsttaLayer(module, block_width(tower, place.block), place.modality, name)

    def _update(self, layer: LsttaLayer, adapter_name: str, config: LsttaConfig, name: str) -> None:
        layer.update_layer(adapter_name, self._places[name].levels, config)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks for the name at the end of a key; here it is in front of a module's keys.
        return re.sub(rf"(\.lstta_adapter)\.{re.escape(adapter_name)}(?=\.)", r"\1", key, count=1)

    def unload(self) -> nn.Module:
        """The base model as it was, without the adapters."""
        model = super().unload()
        _, composite = find_composite(model)
        composite.make_exchange.restore_checkpointing()
        composite.make_exchange.leave(composite)
        del composite.make_exchange
        return model


def _warn_of_layerdrop(towers: dict[str, nn.Module]) -> None:
    for modality, tower in towers.items():
        places = [getattr(tower, "config", None), *tower.modules()]
        dropping = {
            n for place in places if place is not None for n, v in vars(place).items() if n.endswith("layerdrop") and v
        }
        if dropping:
            warnings.warn(
                f"The {modality} tower leaves out blocks at random in training ({', '.join(sorted(dropping))}), and "
                "with them its meetings with the other towers. Set that to 0.",
                stacklevel=2,
            )


def _stages_around_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The parts of a model that hold adapted blocks and could be checkpointed as a whole."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, LsttaLayer)]
    around = {".".join(name.split(".")[:depth]) for name in layers for depth in range(name.count(".") + 1)}
    stages = (modules[name] for name in sorted(around))
    return [stage for stage in stages if isinstance(stage, GradientCheckpointingLayer)]


def _block(tower: nn.Module, modality: str, name: str) -> nn.Module:
    try:
        return tower.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"The {modality} tower, a {type(tower).__name__}, has no block {name!r}. `layers` of the LsttaConfig "
            "names blocks relative to their tower, such as 'encoder.layers.0'."
        ) from None
