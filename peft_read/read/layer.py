"""The layer of READ: wraps a module and adds the recurrent bottleneck adapter to what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..forward.call import RunningForward, SameObjects
from ..forward.context import ForwardContext
from ..forward.decoding import LeftStates, state_before
from ..forward.description import description_of, descriptions
from ..forward.frames import FrameRows, frames_of
from ..forward.packing import described_starts, starts_of
from ..forward.padding import described_padding, padding_of, takes_a_mask
from ..precision import at_least_float32, linear, weights_at_hand, without_autocast
from ..recurrence.cells import State
from ..recurrence.module import Recurrence
from ..recurrence.packed import packed_states, unpack_state
from ..tracing import is_tracing
from ..tuners.layer import AdapterLayer
from .config import ReadConfig


class _Tokens(NamedTuple):
    """What the recurrence must know of the tokens in some rows of the batch.

    Attributes:
        batch: rows of the whole batch.
        rows: which of them these are; None for all.
        valid: `(rows, time)`, true where a token isn't padding; None if none is.
        starts: `(rows, time)`, true where a sequence begins that isn't the first of its row; None if there is none.
        running: the forward that they run through; None outside of one.
        frames: which are which frame, where those of all samples lie in one axis.
    """

    batch: int
    rows: Tensor | None = None
    valid: Tensor | None = None
    starts: Tensor | None = None
    running: RunningForward | None = None
    frames: FrameRows | None = None

    def of_rows(self, rows: Tensor) -> _Tokens:
        """The same for some rows of the whole batch."""
        valid, starts = (None if given is None else given[rows] for given in (self.valid, self.starts))
        return self._replace(rows=rows, valid=valid, starts=starts)


class ReadLayer(AdapterLayer):
    """y = base(x) -> y + scaling * dropout(up(act(cell(down(y))))), the recurrence running over time (READ).

    Works on the output alone, so the base may be any module whose output's last dimension is the feature dimension,
    given as a tensor or as the first of a tuple: a linear layer of any kind, a mixture of experts as a whole. Several
    active adapters add up. Computed in float32 at least, returned in the dtype of the base's output.

    Args:
        base_layer: the module to wrap.
        out_features: size of the last dimension of its output.
        context: the running calls of the model that owns the module.
        module_name: the module's name in the adapted model, for messages.
        part: name of the part of that model whose mask counts where the model's own doesn't fit.
        around: the running calls of the models around that one, which may be given videos.
        packed: of a tower whose output has the tokens of all samples in one axis, how many patches of a frame it
            merges into one at its end (1: none); None for other models.
    """

    adapter_layer_names: tuple[str, ...] = ("read_downward", "read_recurrence", "read_upward")
    other_param_names: tuple[str, ...] = ("r", "scaling", "num_frames", "activation", "read_dropout")
    cannot_merge = (
        "READ can't be merged: its activation, and its recurrence over other time steps, can't be folded into a "
        "layer's matrix. "
        "Keep the adapter beside the model, or call `unload()` to get the base model back."
    )

    def __init__(
        self,
        base_layer: nn.Module,
        out_features: int,
        context: ForwardContext,
        module_name: str,
        part: str | None = None,
        around: Sequence[ForwardContext] = (),
        packed: int | None = None,
    ) -> None:
        super().__init__(base_layer, getattr(base_layer, "in_features", out_features), out_features, module_name)
        self.context = context
        self.part = part
        self.around = tuple(around)
        self.packed = packed
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.num_frames: dict[str, int | None] = {}
        self.activation: dict[str, nn.Module] = {}
        self.read_dropout = nn.ModuleDict()
        self.read_downward = nn.ModuleDict()
        self.read_recurrence = nn.ModuleDict()
        self.read_upward = nn.ModuleDict()

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
            self.read_recurrence[adapter_name] = Recurrence(config.cell, r, bidirectional=config.bidirectional)
            states = 2 * r if config.bidirectional else r
        up = nn.Linear(states, self.out_features)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.read_upward[adapter_name] = up
        self.settle(adapter_name, config)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, beams: int = 1, **kwargs: Any) -> Any:
        """The base's output, adapted by the active adapters, or sample by sample by those named (`"__base__"`: none).

        Args:
            *args: of the base layer.
            adapter_names: one name per sample.
            beams: rows that generation makes of a sample.
            **kwargs: of the base layer.

        Raises:
            ValueError: if the output has no time axis that the recurrence could run over, or the model was given
                something under which its result would be wrong: a mask that doesn't fit, a cache filled without READ.
        """
        output = self.base_layer(*args, **kwargs)
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in chosen if name in self.read_downward]
        if self.disable_adapters or (adapter_names is None and not names):
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.is_nested:
            raise ValueError(
                f"READ at {self.module_name} can't run over nested tensors, which torch's nn.TransformerEncoder makes "
                "of padded batches in evaluation. Build it with enable_nested_tensor=False."
            )
        if hidden.shape[-1] != self.out_features:
            raise ValueError(
                f"READ at {self.module_name} was made for {self.out_features} features, but this module's output has "
                f"shape {tuple(hidden.shape)}. Target a module whose output ends in the model's width."
            )
        if self.packed is not None and adapter_names is not None:
            if not names:
                return output
            self._check_one_adapter(adapter_names)
            names, adapter_names = names[:1], None
        x, tokens = self._tokens_and_call(hidden, names)
        if adapter_names is None:
            adapted = x
            for name in names:
                adapted = adapted + self._delta(name, x, tokens)
        else:
            adapted = self._adapt_rows(x, tokens, adapter_names, beams)
        if adapted.ndim != hidden.ndim:
            adapted = adapted.view(hidden.shape)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    def _adapt_rows(self, x: Tensor, tokens: _Tokens, adapter_names: list[str], beams: int) -> Tensor:
        """Each row with the adapter named for it; the rows of one sample, its beams or frames, follow each other."""
        frames = {self.num_frames[name] or 1 for name in adapter_names if name in self.num_frames}
        each = self.rows_per_sample(adapter_names, x.shape[0], {1, beams} | frames)
        adapted = x.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.read_downward:
                chosen = torch.tensor([n == name for n in adapter_names], device=x.device)
                rows = chosen.repeat_interleave(each).nonzero()[:, 0]
                adapted[rows] = x[rows] + self._delta(name, x[rows], tokens.of_rows(rows))
        return adapted

    def _check_one_adapter(self, adapter_names: list[str]) -> None:
        """Refuse several in one batch where a sample's rows can't be told from another's."""
        if len(set(adapter_names)) > 1:
            raise ValueError(
                f"READ at {self.module_name} can't give each sample an adapter of its own: the patches of all samples "
                "lie in one axis here. Run the samples of each adapter by themselves."
            )

    def _delta(self, name: str, x: Tensor, tokens: _Tokens) -> Tensor:
        """What adapter `name` adds to `x (..., dim)`."""
        down, up = cast(nn.Linear, self.read_downward[name]), cast(nn.Linear, self.read_upward[name])
        with without_autocast(x.device):
            bottleneck = linear(self._cast_input_dtype(x, at_least_float32(down.weight.dtype)), down)
            if name in self.read_recurrence:
                bottleneck = self._recur(name, bottleneck, tokens)
            added = linear(self.activation[name](bottleneck), up)
            scaling, dropout = self.scaling[name], cast(nn.Dropout, self.read_dropout[name])
            if dropout.p > 0:
                added = dropout(added)
            if scaling != 1:
                added = scaling * added
            return added if added.dtype == x.dtype else added.to(x.dtype)

    def _recur(self, name: str, x: Tensor, tokens: _Tokens) -> Tensor:
        """Run the recurrence over the tokens or over the frames of `x (batch, tokens, r)`."""
        cell, frames = cast(Recurrence, self.read_recurrence[name]), self.num_frames[name]
        if tokens.frames is not None:
            return self._recur_over_rows(cell, x, tokens.frames)
        if frames is not None:
            return self._recur_over_frames(cell, frames, x, tokens)
        if tokens.running is None:
            return cell(x, tokens.valid, starts=tokens.starts)
        call, left = tokens.running.call, tokens.running.left
        key = f"{self.module_name}, adapter {name}"
        while left is not None and key in left:
            key += ", again"  # some models call one module in several places
        before = state_before(call, key, tokens.rows)
        start = None if before is None else unpack_state(before, cell)
        if left is None or cell.bidirectional or tokens.starts is not None:
            return cast(Tensor, cell(x, tokens.valid, start, tokens.starts))
        memory = None
        if x.shape[1] == 1 and tokens.valid is None:
            outputs, memory = cell(x, state=start, with_memory=True)
        else:
            outputs = cell(x, tokens.valid, start)
        # Without `tokens`, which would form a reference cycle through the running forward.
        keep = partial(self._states_to_keep, cell, x, outputs, tokens.valid, start, memory, tokens.rows, tokens.batch)
        left[key] = LeftStates(keep, is_partial=x.shape[0] != tokens.batch)
        return outputs

    @staticmethod
    def _states_to_keep(
        cell: Recurrence,
        x: Tensor,
        outputs: Tensor,
        valid: Tensor | None,
        start: State | None,
        memory: Tensor | None,
        rows: Tensor | None,
        batch: int,
    ) -> Tensor:
        """The state after every token, `(batch, time, width)`, for all rows of the batch."""
        if cell.kind != "lstm":
            states = outputs
        elif memory is not None:  # of the only token
            states = torch.cat([outputs, memory], dim=-1)
        else:
            with weights_at_hand(cell):
                states = packed_states(x, outputs, cell, mask=valid, state=start)
        if rows is None or batch == states.shape[0]:
            return states
        every = states.new_full((batch, *states.shape[1:]), torch.nan)
        every[rows] = states
        return every

    @staticmethod
    def _recur_over_rows(cell: Recurrence, x: Tensor, frames: FrameRows) -> Tensor:
        """Each place's state over the frames of its video, of packed `x (rows, r)`."""
        states = [cell(x[rows]).flatten(0, 1) for rows in frames.groups]
        return torch.cat(states)[frames.back]

    def _recur_over_frames(self, cell: Recurrence, frames: int, x: Tensor, given: _Tokens) -> Tensor:
        """Each token position's state over the frames of its video: `(videos * frames, tokens, r)`."""
        check, valid = partial(self._check_videos, frames, x.shape[0]), given.valid
        if given.running is None or is_tracing():
            check()
        else:  # also for checkpoints, which compute a part of a tower again after the models around it have ended
            given.running.once(("videos", frames, x.shape[0]), check)
        if x.shape[0] % frames:
            raise ValueError(
                f"READ at {self.module_name} recurs over num_frames={frames} frames a video, which doesn't divide its "
                f"batch of {x.shape[0]} images. Give whole videos, or set `num_frames` to the frames that they have."
            )
        tokens = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        if valid is not None:
            valid = valid.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        states = cell(x, valid)
        return states.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)

    def _check_videos(self, frames: int, images: int) -> None:
        """Compare with the videos that the models around this one were given."""
        for context in self.around:
            running = context.running()
            if running is None or running.call.videos is None:
                continue
            videos, given = running.call.videos
            if given != frames:
                raise ValueError(
                    f"READ at {self.module_name} recurs over num_frames={frames} frames a video, but the model was "
                    f"given videos of {given} frames. Give videos of {frames} frames, or set `num_frames`."
                )
            if videos * given != images:
                raise ValueError(
                    f"READ at {self.module_name} recurs over frames, but of {videos} videos of {given} frames it sees "
                    f"{images} images: the model has left some out, as SmolVLM does with frames of padding, so that "
                    "videos would mix. Give videos of as many frames as each other, none of them blank."
                )

    def _tokens_and_call(self, hidden: Tensor, names: list[str]) -> tuple[Tensor, _Tokens]:
        """The output as `(batch, time, dim)` and what is known of its tokens, as far as the adapters need time."""
        recurrent = [name for name in names if name in self.read_recurrence]
        if not recurrent and hidden.ndim != 2:
            return hidden, _Tokens(hidden.shape[0])
        running = self.context.running()
        if recurrent and self.packed is not None:
            return self._packed_rows(hidden, running)
        shape = running.call.tokens_shape if running is not None else None
        if hidden.ndim == 2 and shape is not None and shape[0] * shape[1] == hidden.shape[0]:
            hidden = hidden.unflatten(0, shape)  # some blocks (OPT's) flatten the rows around their feed-forward part
        if not recurrent:
            return hidden, _Tokens(hidden.shape[0])
        if hidden.ndim != 3:
            raise ValueError(
                f"READ needs an output of shape (batch, time, features), but {self.module_name} gives one of shape "
                f"{tuple(hidden.shape)}. Target the module that gives such an output, or use cell='none'."
            )
        shape = (hidden.shape[0], hidden.shape[1])
        if running is None:
            return hidden, self._described_tokens(shape)
        both_ways = any(cast(Recurrence, self.read_recurrence[name]).bidirectional for name in recurrent)
        valid, starts = self._valid_and_starts(running, shape, both_ways)
        return hidden, _Tokens(hidden.shape[0], valid=valid, starts=starts, running=running)

    def _packed_rows(self, hidden: Tensor, running: RunningForward | None) -> tuple[Tensor, _Tokens]:
        """The output as `(rows, dim)`, and which rows are which frame."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if running is None:
            raise RuntimeError(
                f"READ at {self.module_name} runs outside of a call of its tower, so that it can't tell frames apart. "
                "Call the tower, or the model around it."
            )
        frames = frames_of(running, self.around, rows, self.packed or 1, self.module_name)
        return rows, _Tokens(rows.shape[0], running=running, frames=frames)

    def _valid_and_starts(
        self, running: RunningForward, shape: tuple[int, int], both_ways: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are valid, and where sequences begin: found once for all layers that are given the same."""
        call = running.call

        def find() -> tuple[Tensor | None, Tensor | None]:
            valid = padding_of(running, shape, self.module_name, self.part)
            is_told = call.mask is not None or takes_a_mask(running, self.part)
            if call.unread_masks and not is_told and description_of(self.module_name, call.described) is None:
                self.context.warn_of_masks(call.unread_masks)
            return valid, starts_of(running, shape, self.module_name, self.part, both_ways=both_ways)

        # A description may be about some modules only, and sizes that a tracer keeps open can't be a key.
        if call.described or is_tracing():
            return find()
        # Blocks are parts of their own, but most are given the same masks.
        given = SameObjects({"of the model": call.mask_at(self.module_name), **running.given(self.part)})
        return running.once((shape, both_ways, given), find)

    def _described_tokens(self, shape: tuple[int, int]) -> _Tokens:
        """What is known of the tokens outside of a call of the model."""
        description = description_of(self.module_name, descriptions())
        if description is not None:
            valid = described_padding(description.valid, shape, self.module_name)
            starts = described_starts(description.sequence_ids, shape, self.module_name)
            return _Tokens(shape[0], valid=valid, starts=starts)
        if self.context.is_required:
            raise RuntimeError(
                f"READ at {self.module_name} runs outside of a call of its model, so that it can't tell which tokens "
                "are padding. Call the model, or say it: `with peft_read.describe_tokens(valid): ...`, or "
                "`with peft_read.describe_tokens(): ...` where no token is."
            )
        self.context.warn_of_no_call(self.module_name)
        return _Tokens(shape[0])

    def __repr__(self) -> str:
        return "read." + super().__repr__()


class ReadLinear(ReadLayer):
    """A `ReadLayer` around a linear layer: `"all-linear"` finds wrapped linears by the word in their class's name."""


class CalledWeight(Tensor):
    """The weight of a module that is to be called, see `ReadLinearOfTorch`."""


class ReadLinearOfTorch(ReadLinear):
    """A `ReadLinear` inside of torch's `nn.TransformerEncoderLayer`.

    In evaluation that layer reads the weights of its parts and calls none of them, unless one is of a subclass that
    may override torch's functions. Without an active adapter the weight is the base layer's own.
    """

    @property
    def weight(self) -> Tensor:
        """The base layer's, so that it says that it has to be called while an adapter is active."""
        weight = cast(Tensor, self.base_layer.weight)
        active = not self.disable_adapters and any(name in self.read_downward for name in self.active_adapters)
        return weight.as_subclass(CalledWeight) if active else weight
