"""Options of the Trainers that align video and language, as fields of their training arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .loss import PvlaLoss
from .source import SOURCES
from .words import WORDS


DEFAULT_WEIGHT = 0.05


@dataclass
class PvlaArguments:
    """The options of PVLA; inherit from this and from a class of training arguments, in this order.

    With `pvla_negatives` the alignment's loss in evaluation is that of telling a sample from the others of its
    evaluation batch, on all devices: the mean over the samples that have such others, a last batch's as well, and 0
    where no sample has any. More others are harder to tell apart, so compare it, and the `eval_loss` that it is in, at
    one `per_device_eval_batch_size` only, of 2 at least.

    Raises:
        ValueError: if an option is out of its range.
    """

    pvla_weight: float = field(
        default=DEFAULT_WEIGHT, metadata={"help": "Weight of the alignment loss beside the task's; 0 leaves it out."}
    )
    pvla_gradient_share: float | None = field(
        default=None,
        metadata={
            "help": "Instead of a weight: size of the alignment's gradient on the adapters as a share of the task's, "
            "such as 0.05. The weight that makes it so is measured anew every 10 steps."
        },
    )
    pvla_mass: float = field(default=0.5, metadata={"help": "Share of frames and words that is matched, in (0, 1]."})
    pvla_reg: float = field(default=0.05, metadata={"help": "Weight of the entropy in the transport problem."})
    pvla_iterations: int = field(default=50, metadata={"help": "Iterations of the transport solver."})
    pvla_cost: Literal["cosine", "sqeuclidean"] = field(
        default="cosine", metadata={"help": "Distance between the states of a frame and a word."}
    )
    pvla_marginals: Literal["unit", "uniform"] = field(
        default="unit",
        metadata={"help": "'unit': words and frames are matched one to one; 'uniform': by their shares of the whole."},
    )
    pvla_states: Literal["auto", "last_block", "all_blocks", "bottleneck", "inputs", "towers"] = field(
        default="auto",
        metadata={
            "help": "Which states are aligned: video and text tokens in the last block that READ adapts, in all of "
            "them, or in the last adapter's low-dimensional space; 'inputs': as they enter the first tower that READ "
            "adapts, projected video tokens against the embeddings of words; or those of a dual encoder's two towers. "
            "'auto': the towers where there are two, else the last block."
        },
    )
    pvla_words: Literal["all", "answer", "prompt"] = field(
        default="all",
        metadata={
            "help": "Which text tokens of a sequence are words: all, those with a label ('answer'), or those without "
            "('prompt'). Special tokens and what a chat template puts behind them never are; a collator's "
            "'text_token_mask' says more. Of a dual encoder's texts all valid tokens are."
        },
    )
    pvla_pool_frames: bool = field(
        default=False,
        metadata={"help": "Align the means of each frame's tokens, where a frame is many of them, as patches are."},
    )
    pvla_negatives: bool = field(
        default=False,
        metadata={
            "help": "Beyond the paper: tell each video's sentence from the other sentences of the batch, on all "
            "devices, and each sentence's video from the other videos. For inputs and towers only."
        },
    )
    pvla_temperature: float = field(
        default=0.1, metadata={"help": "Of the contrast with the negatives, in the unit of the distances."}
    )
    pvla_pairs_batch_size: int = field(
        default=16, metadata={"help": "Pairs of `pairs_dataset` that a step aligns, on each device."}
    )
    pvla_health_steps: int = field(
        default=100, metadata={"help": "Steps between two measurements of the alignment's health; 0: never."}
    )
    pvla_plot_plans: bool = field(
        default=False,
        metadata={
            "help": "Draw the transport plan of an example at each evaluation: a PNG in output_dir, and loggers."
        },
    )

    def __post_init__(self) -> None:
        self.check_pvla()
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()

    def check_pvla(self) -> None:
        """Raise a `ValueError` if an option is out of its range."""
        if not self.pvla_weight >= 0:
            raise ValueError(f"pvla_weight={self.pvla_weight}: expected 0 or a positive number.")
        if self.pvla_gradient_share is not None and not self.pvla_gradient_share > 0:
            raise ValueError(f"pvla_gradient_share={self.pvla_gradient_share}: expected a positive share, or none.")
        if self.pvla_gradient_share is not None and self.pvla_weight not in (0.0, DEFAULT_WEIGHT):
            raise ValueError(
                f"pvla_weight={self.pvla_weight} would be measured anew for "
                f"pvla_gradient_share={self.pvla_gradient_share}: give one of them."
            )
        if self.pvla_states not in SOURCES:
            raise ValueError(f"pvla_states={self.pvla_states!r}: expected one of {', '.join(map(repr, SOURCES))}.")
        if self.pvla_words not in WORDS:
            raise ValueError(f"pvla_words={self.pvla_words!r}: expected one of {', '.join(map(repr, WORDS))}.")
        if self.pvla_health_steps < 0:
            raise ValueError(f"pvla_health_steps={self.pvla_health_steps}: expected 0 or a number of steps.")
        if self.pvla_pairs_batch_size < 1:
            raise ValueError(f"pvla_pairs_batch_size={self.pvla_pairs_batch_size}: expected at least 1.")
        self.pvla_loss()  # raises where an option of the loss is out of its range

    @property
    def uses_pvla(self) -> bool:
        """Whether there is an alignment loss at all."""
        return self.pvla_weight > 0 or self.pvla_gradient_share is not None

    def pvla_loss(self) -> PvlaLoss:
        """The loss that these options describe."""
        return PvlaLoss(
            self.pvla_mass,
            self.pvla_reg,
            self.pvla_iterations,
            self.pvla_cost,
            self.pvla_marginals,
            self.pvla_negatives,
            self.pvla_temperature,
        )


@dataclass
class PvlaTrainingArguments(PvlaArguments, TrainingArguments):
    """transformers' `TrainingArguments` with the options of PVLA."""


@dataclass
class PvlaSeq2SeqTrainingArguments(PvlaArguments, Seq2SeqTrainingArguments):
    """transformers' `Seq2SeqTrainingArguments` with the options of PVLA."""
