"""The layer of READ: wraps a module and adds the recurrent bottleneck adapter to what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .config import ReadConfig
from .context import ForwardCall, ForwardContext
from .recurrence import recurrent_scan, without_autocast


CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class ReadLayer(nn.Module, BaseTunerLayer):
    """y = base(x) -> y + scaling * dropout(up(act(cell(down(y))))), the recurrence running over time (READ).

    Works on the output alone, so the base may be any module whose output's last dimension is the feature dimension,
    given as a tensor or as the first of a tuple: a linear layer of any kind, a mixture of experts as a whole. Several
    active adapters add up. Computed in float32 at least, returned in the dtype of the base's output.

    Args:
        base_layer: the module to wrap.
        out_features: size of the last dimension of its output.
        context: the running calls of the model that owns the module.
        module_name: the module's name in the adapted model, for messages.
    """

    adapter_layer_names: tuple[str, ...] = ("read_downward", "read_recurrence", "read_upward")
    other_param_names: tuple[str, ...] = ("r", "scaling", "num_frames", "activation", "read_dropout")

    def __init__(self, base_layer: nn.Module, out_features: int, context: ForwardContext, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = getattr(base_layer, "in_features", out_features)
        self.out_features = out_features
        self.context = context
        self.module_name = module_name
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.num_frames: dict[str, int | None] = {}
        self.activation: dict[str, nn.Module] = {}
        self.read_dropout = nn.ModuleDict()
        self.read_downward = nn.ModuleDict()
        self.read_recurrence = nn.ModuleDict()
        self.read_upward = nn.ModuleDict()
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, r: int, config: ReadConfig) -> None:
        """Add an adapter of width `r`, or replace the one of that name."""
        self.r[adapter_name] = r
        self.scaling[adapter_name] = float(config.scaling)
        self.num_frames[adapter_name] = config.num_frames
        self.activation[adapter_name] = ACT2FN[config.act_fn]
        self.read_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.read_downward[adapter_name] = nn.Linear(self.out_features, r)
        states = r
        if config.cell != "none":
            cell = CELLS[config.cell](r, r, batch_first=True, bidirectional=config.bidirectional)
            self.read_recurrence[adapter_name] = cell
            states = 2 * r if config.bidirectional else r
        up = nn.Linear(states, self.out_features)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.read_upward[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, beams: int = 1, **kwargs: Any) -> Any:
        """The base's output, adapted by the active adapters, or sample by sample by those named (`"__base__"`: none).

        Args:
            adapter_names: one name per sample.
            beams: rows that generation makes of a sample.

        Raises:
            ValueError: if the output has no time axis that the recurrence could run over, or the model was given
                something under which its result would be wrong: a mask that doesn't fit, a filled cache, packed rows.
        """
        output = self.base_layer(*args, **kwargs)
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in chosen if name in self.read_downward]
        if self.disable_adapters or (adapter_names is None and not names):
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[-1] != self.out_features:
            raise ValueError(
                f"READ at {self.module_name} was made for {self.out_features} features, but this module's output has "
                f"shape {tuple(hidden.shape)}. Target a module whose output ends in the model's width."
            )
        tokens, valid = self._tokens_and_padding(hidden, names)
        if adapter_names is None:
            adapted = tokens
            for name in names:
                adapted = adapted + self._delta(name, tokens, valid)
        else:
            adapted = self._adapt_rows(tokens, valid, adapter_names, beams)
        adapted = adapted.view(hidden.shape)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    def _adapt_rows(self, tokens: Tensor, valid: Tensor | None, adapter_names: list[str], beams: int) -> Tensor:
        """Each row with the adapter named for it; the rows of one sample, its beams or frames, follow each other."""
        frames = {self.num_frames[name] or 1 for name in adapter_names if name in self.num_frames}
        allowed = {1, beams} | frames
        rows_per_name = len(tokens) // max(len(adapter_names), 1)
        if rows_per_name not in allowed or rows_per_name * len(adapter_names) != len(tokens):
            raise ValueError(
                f"`adapter_names` must name one adapter per sample: got {len(adapter_names)} names for "
                f"{len(tokens)} rows at {self.module_name}."
            )
        adapted = tokens.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.read_downward:
                chosen = torch.tensor([n == name for n in adapter_names], device=tokens.device)
                rows = chosen.repeat_interleave(rows_per_name).nonzero()[:, 0]
                adapted[rows] = tokens[rows] + self._delta(name, tokens[rows], None if valid is None else valid[rows])
        return adapted

    def _delta(self, name: str, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """What adapter `name` adds to `tokens (..., dim)`, of which `valid (batch, time)` aren't padding."""
        down, up = cast(nn.Linear, self.read_downward[name]), cast(nn.Linear, self.read_upward[name])
        with without_autocast(tokens.device):
            dtype = torch.promote_types(down.weight.dtype, torch.float32)
            bottleneck = _linear(self._cast_input_dtype(tokens, dtype), down)
            if name in self.read_recurrence:
                bottleneck = self._recur(name, bottleneck, valid)
            added = _linear(self.activation[name](bottleneck), up)
            return (self.scaling[name] * self.read_dropout[name](added)).to(tokens.dtype)

    def _recur(self, name: str, x: Tensor, valid: Tensor | None) -> Tensor:
        """Run the recurrence over the tokens or over the frames of `x (batch, tokens, r)`."""
        cell, frames = cast(nn.RNNBase, self.read_recurrence[name]), self.num_frames[name]
        if frames is None:
            return recurrent_scan(x, cell, mask=valid)[0]
        if len(x) % frames:
            raise ValueError(
                f"READ at {self.module_name} recurs over num_frames={frames} frames a video, which doesn't divide its "
                f"batch of {len(x)} images. Give whole videos, or set `num_frames` to the frames that they have."
            )
        # (videos * frames, tokens, ...) -> (videos * tokens, frames, ...) and back
        tokens = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        if valid is not None:
            valid = valid.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        states = recurrent_scan(x, cell, mask=valid)[0]
        return states.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)

    def _tokens_and_padding(self, hidden: Tensor, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """The output as `(batch, time, dim)` and its mask, checked, as far as the adapters `names` need time."""
        recurrent = [name for name in names if name in self.read_recurrence]
        if not recurrent and hidden.ndim != 2:
            return hidden, None
        call = self.context.running()
        shape = call.tokens_shape if call is not None else None
        if hidden.ndim == 2 and shape is not None and shape[0] * shape[1] == len(hidden):
            hidden = hidden.unflatten(0, shape)  # some blocks (OPT's) flatten the rows around their feed-forward part
        if not recurrent:
            return hidden, None
        if hidden.ndim != 3:
            raise ValueError(
                f"READ needs an output of shape (batch, time, features), but {self.module_name} gives one of shape "
                f"{tuple(hidden.shape)}. Target the module that gives such an output, or use cell='none'."
            )
        if call is None:
            return hidden, None
        if any(self.num_frames[name] is None for name in recurrent):
            self._refuse_partial_sequences(call)
        if call.mask is not None and call.mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"READ at {self.module_name} can't tell padding there: the model's `attention_mask` has shape "
                f"{tuple(call.mask.shape)}, this module's output (batch, time) = {tuple(hidden.shape[:2])}. Leave the "
                "mask out if nothing is padded, or target modules that see the tokens that it is about."
            )
        return hidden, call.mask

    def _refuse_partial_sequences(self, call: ForwardCall) -> None:
        if call.continues_cache:
            raise ValueError(
                f"READ at {self.module_name} can't continue from a filled cache: the recurrent state of the earlier "
                "tokens isn't in it. Pass the whole sequence; with `generate`, set use_cache=False."
            )
        if call.is_packed:
            raise ValueError(
                f"READ at {self.module_name} would carry its state from one packed sequence into the next. Pad the "
                "sequences into rows of their own and pass an `attention_mask`."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a recurrence can't be folded into a matrix."""
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refuse: nothing can have been merged."""
        raise NotImplementedError(CANNOT_MERGE)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet while the layer is built or unpickled
                raise
            # Blocks read attributes of the modules that they call; T5's looks at `wo.weight.dtype`.
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # a block of modules, which has no weight of its own
            parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
            device, dtype = (None, None) if parameter is None else (parameter.device, parameter.dtype)
        return device, dtype

    def __repr__(self) -> str:
        return "read." + super().__repr__()


class ReadLinear(ReadLayer):
    """A `ReadLayer` around a linear layer: `"all-linear"` finds wrapped linears by the word in their class's name."""


CANNOT_MERGE = (
    "READ can't be merged: its recurrence looks at other time steps, so it can't be folded into a layer's matrix. "
    "Keep the adapter beside the model, or call `unload()` to get the base model back."
)


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    if linear.weight.dtype == x.dtype:
        return linear(x)
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
