"""The configuration of READ: every field that a user sets, validated when it is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftType

from ..tuners.checks import (
    check_bool,
    check_choice,
    check_indices,
    check_names,
    check_pattern,
    check_positive_int,
    shown,
)
from ..tuners.config import AdapterConfig


Cell = Literal["rnn", "gru", "lstm", "none"]
RecurOver = Literal["sequence", "frames"]


@dataclass
class ReadConfig(AdapterConfig):
    """Configuration of READ, the recurrent adapter (Nguyen et al., AAAI 2024, arXiv 2312.06950).

    Next to each targeted module, whose output is y, sits `y + scaling * dropout(up(act(cell(down(y)))))`: a bottleneck
    adapter whose low-dimensional states run over time. The paper places it after the feed-forward part of every
    transformer block and uses `cell="rnn"`, `act_fn="gelu"`. The `up` projection starts at zero, so that the adapted
    model starts as the base model. What the paper leaves open is our choice: `down` and the cell start as torch
    initialises them.

    Args:
        r: width of the bottleneck and of the recurrent state.
        cell: the recurrence: `"rnn"` (tanh, the paper's), `"gru"`, `"lstm"`, or `"none"`: a plain bottleneck adapter.
        bidirectional: run over time in both directions, each with a state of width `r`. For encoders only: in a
            decoder it would show every token its future.
        act_fn: activation between cell and up-projection, a key of transformers' `ACT2FN` without weights of its own.
        dropout: probability with which entries of the adapter's output are dropped in training.
        scaling: factor of the adapter's output.
        recur_over: what time is: `"sequence"`, the tokens of an output `(batch, time, dim)`, or `"frames"`: an image
            tower sees a video as `(batch * frames, tokens, dim)` and the state of each token position runs over the
            frames of its video.
        num_frames: frames per video, for `recur_over="frames"` only; has to divide the batch that the tower sees.
        target_modules: names of the modules to adapt: a list of names or name endings, a regular expression that
            matches whole names, or `"all-linear"`. By default those feed-forward outputs
            ([`find_feed_forward_outputs`] lists all) where video and text run: in generative composites the language
            tower's, in dual encoders and encoder-decoders those of both sides.
        exclude_modules: names, or a regular expression, of modules not to adapt.
        layers_to_transform: index or indices of the blocks to adapt; all by default.
        layers_pattern: name of the list of blocks to which `layers_to_transform` refers, if it is an unusual one.
        rank_pattern: widths that differ from `r`, by module name or regular expression.
        modules_to_save: modules, such as a task head, that are trained and saved beside the adapter.
        trainable_token_indices: tokens whose embeddings are trained and saved beside the adapter, such as new tokens
            for videos: indices into the input embeddings, or lists of indices by names of embeddings.
        ensure_weight_tying: keep tied what is tied to the input embeddings, where `modules_to_save` or
            `trainable_token_indices` train those.
        init_weights: start as the base model (default); False starts `up` at random too, which only tests need.

    Raises:
        ValueError: if a field has a value that it can't have, or two fields contradict each other.
    """

    r: int = field(default=16, metadata={"help": "Width of the bottleneck and of the recurrent state."})
    cell: str = field(default="rnn", metadata={"help": "The recurrence: 'rnn', 'gru', 'lstm' or 'none'."})
    bidirectional: bool = field(default=False, metadata={"help": "Run over time both ways (encoders only)."})
    recur_over: str = field(default="sequence", metadata={"help": "What time is: 'sequence' or 'frames'."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames per video, if recur_over='frames'."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: names or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that `layers_to_transform` indexes."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Widths that differ from `r`, by module name or regular expression."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["READ"]
        self._check_values()
        self._check_places()
        self._check_contradictions()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT keeps it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """All fields; names in a fixed order, so that the same configuration is saved as the same file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def _check_values(self) -> None:
        check_positive_int("r", self.r)
        check_choice("cell", self.cell, get_args(Cell))
        check_choice("recur_over", self.recur_over, get_args(RecurOver))
        check_bool("bidirectional", self.bidirectional)

    def _check_places(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and (value or name == "target_modules"):
                check_pattern(name, value)
            elif value or (value is not None and name == "target_modules"):
                check_names(name, value)
        if self.layers_to_transform is not None:
            check_indices("layers_to_transform", self.layers_to_transform)
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            check_pattern("layers_pattern", pattern)
        if not isinstance(self.rank_pattern or {}, dict):
            raise ValueError(
                f"`rank_pattern` must be a dict of widths by module name, got {shown(self.rank_pattern)}."
            )
        for pattern, rank in (self.rank_pattern or {}).items():
            check_pattern("rank_pattern", pattern)
            check_positive_int(f"rank_pattern[{pattern!r}]", rank)

    def _check_contradictions(self) -> None:
        if self.cell == "none" and (self.bidirectional or self.recur_over != "sequence"):
            raise ValueError(
                "`cell='none'` has no recurrence: leave `bidirectional` and `recur_over` at their defaults, or choose "
                "a cell."
            )
        if self.recur_over == "frames":
            if self.num_frames is None:
                raise ValueError("`recur_over='frames'` needs `num_frames`, the number of frames per video.")
            check_positive_int("num_frames", self.num_frames)
        elif self.num_frames is not None:
            raise ValueError("`num_frames` is for `recur_over='frames'` only; leave it out or set that.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says what `layers_to_transform` indexes: set that too, or neither.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` doesn't go with a `target_modules` that is a string: put the layers into the "
                "regular expression, or give a list of names."
            )
