"""What the layers of this package's methods have in common as layers of PEFT that can't be merged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .offloading import execution_device


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer around any module: it forwards what it doesn't know to the module, and refuses to be merged.

    Args:
        base_layer: the module to wrap.
        in_features: size of the last dimension of its input.
        out_features: size of the last dimension of its output.
        module_name: the module's name in the adapted model, for messages.
    """

    cannot_merge: str

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.module_name = module_name
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def settle(self, adapter_name: str, config: PeftConfig) -> None:
        """Bring the weights of an adapter that was just made to where they run, and train them if it is active."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def rows_per_sample(self, adapter_names: Sequence[str], rows: int, allowed: Collection[int] | None = None) -> int:
        """How many rows of the batch each sample has that an adapter is named for; its rows follow each other.

        Args:
            adapter_names: one name per sample.
            rows: of the batch.
            allowed: the numbers that it may be; any by default.

        Raises:
            ValueError: if there is no such number.
        """
        each, left = divmod(rows, max(len(adapter_names), 1))
        if left or not each or not adapter_names or (allowed is not None and each not in allowed):
            raise ValueError(
                f"`adapter_names` must name one adapter per sample: got {len(adapter_names)} names for {rows} rows at "
                f"{self.module_name}."
            )
        return each

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
        return execution_device(base_layer) or device, dtype
