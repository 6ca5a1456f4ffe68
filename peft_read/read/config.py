"""The configuration of READ: every field that a user sets, validated when it is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig, PeftType

from ..tuners.checks import check_activation, check_bool, check_choice, check_dropout, check_finite, check_positive_int


Cell = Literal["rnn", "gru", "lstm", "none"]
RecurOver = Literal["sequence", "frames"]


@dataclass
class ReadConfig(PeftConfig):
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
            tower sees a video as `(batch * frames, tokens, dim)`, or the patches of all videos in one axis, and the
            state of each token position runs over the frames of its video.
        num_frames: frames per video, for `recur_over="frames"` only; has to divide the batch that the tower sees.
            Towers that take `grid_thw`, as Qwen-VL's do, are told it with each video: leave it out for them.
        target_modules: names of the modules to adapt: a list of names or name endings, a regular expression that
            matches whole names, or `"all-linear"`. By default those feed-forward outputs
            ([`find_feed_forward_outputs`] lists all) where video and text run: in generative composites the language
            tower's, in dual encoders and encoder-decoders those of both sides.
        exclude_modules: names, or a regular expression, of modules not to adapt.
        layers_to_transform: index or indices of the blocks to adapt; all by default.
        layers_pattern: name of the list of blocks to which `layers_to_transform` refers, if it is an unusual one.
        rank_pattern: widths that differ from `r`, by module name or regular expression.
        modules_to_save: modules, such as a task head, that are trained and saved beside the adapter.
        init_weights: start as the base model (default); False starts `up` at random too, which only tests need.

    Raises:
        ValueError: if a field has a value that it can't have, or two fields contradict each other.
    """

    r: int = field(default=16, metadata={"help": "Width of the bottleneck and of the recurrent state."})
    cell: str = field(default="rnn", metadata={"help": "The recurrence: 'rnn', 'gru', 'lstm' or 'none'."})
    bidirectional: bool = field(default=False, metadata={"help": "Run over time both ways (encoders only)."})
    act_fn: str = field(default="gelu", metadata={"help": "Activation before the up-projection, a key of ACT2FN."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's output."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
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
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved beside the adapter."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["READ"]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT keeps it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_values()
        self._check_contradictions()

    def to_dict(self) -> dict[str, Any]:
        """All fields; names in a fixed order, so that the same configuration is saved as the same file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def _check_values(self) -> None:
        check_positive_int("r", self.r)
        for pattern, rank in (self.rank_pattern or {}).items():
            check_positive_int(f"rank_pattern[{pattern!r}]", rank)
        check_choice("cell", self.cell, get_args(Cell))
        check_choice("recur_over", self.recur_over, get_args(RecurOver))
        check_bool("bidirectional", self.bidirectional)
        check_bool("init_weights", self.init_weights)
        check_activation("act_fn", self.act_fn)
        check_dropout("dropout", self.dropout)
        check_finite("scaling", self.scaling)

    def _check_contradictions(self) -> None:
        if self.cell == "none" and (self.bidirectional or self.recur_over != "sequence"):
            raise ValueError(
                "`cell='none'` has no recurrence: leave `bidirectional` and `recur_over` at their defaults, or choose "
                "a cell."
            )
        if self.recur_over == "frames":
            if self.num_frames is not None:
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
