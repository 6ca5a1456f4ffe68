"""The layer of LSTTA: wraps a block of a tower and adds what the other towers tell its tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from ..lockstep.coroutines import count_call, current_tower, meet
from ..tuners.layer import AdapterLayer
from .adapter import LsttaAdapter
from .config import LsttaConfig
from .exchange import Offer


class LsttaLayer(AdapterLayer):
    """hidden = block(...) -> hidden + change(messages), where the messages come from the blocks of the other towers.

    Brings its tokens' bottleneck to the meeting of its level, in which the other towers' blocks take part, and waits.
    Used in a tower that runs alone, it is the block. Several active adapters add up.

    Args:
        base_layer: the block: it gives hidden states `(..., width)`, alone or first in a tuple.
        width: size of the hidden states.
        modality: `"vision"`, `"audio"` or `"text"`.
        module_name: the block's name in the adapted model, for messages.
    """

    adapter_layer_names: tuple[str, ...] = ("lstta_adapter",)
    other_param_names: tuple[str, ...] = ("levels",)
    cannot_merge = (
        "LSTTA can't be merged: what it adds depends on the other towers, so it can't be folded into a tower's "
        "weights. Keep the adapter beside the model, or call `unload()` to get the base model back."
    )

    def __init__(self, base_layer: nn.Module, width: int, modality: str, module_name: str) -> None:
        super().__init__(base_layer, width, width, module_name)
        self.modality = modality
        self.levels: dict[str, dict[int, int]] = {}
        self.lstta_adapter = nn.ModuleDict()

    def update_layer(self, adapter_name: str, levels: dict[int, int], config: LsttaConfig) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name.
            levels: at which level each call of the block in a forward meets the other towers; other calls don't.
            config: its settings.
        """
        self.levels[adapter_name] = levels
        self.lstta_adapter[adapter_name] = LsttaAdapter(self.out_features, config, self.modality == "vision")
        self.settle(adapter_name, config)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The block's output, adapted by the active adapters, or sample by sample by those named (`"__base__"`: none).

        Args:
            *args: of the base layer.
            adapter_names: one name per sample.
            **kwargs: of the base layer.

        Raises:
            ValueError: if the hidden states have another width, the active adapters meet at different levels, or
                `adapter_names` has another number of samples.
        """
        output = self.base_layer(*args, **kwargs)
        chosen = self.active_adapters if adapter_names is None else adapter_names
        adapters = {
            name: cast(LsttaAdapter, self.lstta_adapter[name]) for name in chosen if name in self.lstta_adapter
        }
        if self.disable_adapters or not adapters or current_tower() is None:
            return output
        level = self._level_of_this_call(list(adapters))
        if level is None:
            return output
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.shape[-1] != self.out_features:
            raise ValueError(
                f"LSTTA at {self.module_name} was made for {self.out_features} features, but this block's output has "
                f"shape {tuple(hidden.shape)}. Name the tower's blocks in `layers` of the LsttaConfig."
            )
        projections = {
            name: adapter.project(self._cast_input_dtype(hidden, adapter.dtype)) for name, adapter in adapters.items()
        }
        messages = meet(level, Offer(adapters, projections, adapter_names))
        adapted = hidden
        for name, adapter in adapters.items():
            change = adapter.change(messages[name].to(hidden.device))
            if adapter_names is not None:
                change = change * self._rows_of(name, adapter_names, change)
            adapted = adapted + change.to(hidden.dtype)
        show_hidden_states(hidden, adapted)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    def _level_of_this_call(self, names: list[str]) -> int | None:
        call = count_call(self)
        levels = {self.levels[name].get(call) for name in names}
        if len(levels) > 1:
            raise ValueError(
                f"The adapters {names} can't act together: at {self.module_name} they meet the other towers at "
                "different levels. Adapters that are active at once need the same `num_levels` and `layers`."
            )
        return levels.pop()

    def _rows_of(self, name: str, adapter_names: list[str], hidden: Tensor) -> Tensor:
        """1 in the rows of the samples for which an adapter is named, else 0; a sample's frames follow each other."""
        each = self.rows_per_sample(adapter_names, len(hidden))
        rows = torch.tensor([n == name for n in adapter_names], device=hidden.device, dtype=hidden.dtype)
        return rows.repeat_interleave(each)[(...,) + (None,) * (hidden.ndim - 1)]

    def __repr__(self) -> str:
        return "lstta." + super().__repr__()


def show_hidden_states(before: Tensor, after: Tensor) -> None:
    """Put the adapted hidden states in the place of a block's own, in what a running model collects.

    transformers collects hidden states by hooks on blocks, which a module around a block comes too late for. Call this
    there, after the block and before returning. Nothing happens if the running model doesn't collect, or collects
    later by itself.

    Args:
        before: the block's output.
        after: what the rest of the model gets in its place.
    """
    collected = (_active_collector.get() or {}).get("hidden_states")
    if collected and collected[-1] is before:
        collected[-1] = after
