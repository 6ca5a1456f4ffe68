"""Transport plans as pictures, in files and where a Trainer logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from .loss import PvlaDetails
from .source import VideoTextStates


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Inches; images that PNG and loggers can still take.
LARGEST_SIDE = 30


class ExamplePlan(NamedTuple):
    """The plan of one sample, `(frames, words)` without padding, and its words where they are known."""

    plan: Tensor
    words: list[str] | None


def plot_plan(plan: Tensor, words: Sequence[str] | None = None, path: str | Path | None = None) -> Figure:
    """Draw the transport plan of one sample as a heat map, frames against words. Needs matplotlib.

    Args:
        plan: `(frames, words)`, without padding.
        words: one label for each word; by default their numbers.
        path: file to write, by its ending; none is written by default.

    Raises:
        ImportError: if matplotlib isn't installed.
        ValueError: if the plan isn't two-dimensional or the labels don't fit it.

    Example:
        >>> import torch
        >>> figure = plot_plan(torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]]), words=["a", "five"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['a', 'five']
    """
    if plan.ndim != 2:
        raise ValueError(f"plan has shape {tuple(plan.shape)}; expected that of one sample, (frames, words).")
    if words is not None and len(words) != plan.shape[1]:
        raise ValueError(f"{len(words)} labels for the {plan.shape[1]} words of the plan.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures of transport plans need matplotlib: pip install matplotlib") from error
    frames, columns = plan.shape
    width, height = (min(0.28 * size, LARGEST_SIDE) for size in (frames, columns))
    figure = Figure(figsize=(2 + width, 1.2 + height), layout="constrained")
    axes = figure.subplots()
    mass = plan.detach().float().cpu().numpy()
    image = axes.imshow(mass.T, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(xlabel="frame", ylabel="word")
    if words is not None:
        axes.set_yticks(range(columns), labels=words)
    figure.colorbar(image, ax=axes, label="share of the mass")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def example_plan(
    sample: int,
    details: PvlaDetails,
    states: VideoTextStates,
    words: tuple[Tensor, Tensor | None] | None,
    tokenizer: Any,
) -> ExamplePlan:
    """The plan of one of a batch's samples.

    Args:
        sample: its row.
        details: what the loss found.
        states: what it was given.
        words: `input_ids` and which of them are the words, `(batch, time)` each, if that is known.
        tokenizer: a tokenizer, a processor that has one, or nothing that could name words.
    """
    plan = details.plan[sample].detach()
    for axis, mask in ((0, states.frame_mask), (1, states.word_mask)):
        if mask is not None:
            plan = plan.index_select(axis, mask[sample].nonzero()[:, 0])
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if words is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return ExamplePlan(plan, None)
    ids, mask = words
    named = ids[sample] if mask is None else ids[sample][mask[sample].bool()]
    return ExamplePlan(plan, tokenizer.convert_ids_to_tokens(named.tolist()))


def log_plan(trainer: Trainer, example: ExamplePlan, name: str) -> None:
    """Draw a plan into `output_dir/pvla_plans/NAME-step-N.png`, and send it to TensorBoard and W&B where used."""
    step, tag = trainer.state.global_step, f"pvla/{name}_plan"
    folder = Path(str(trainer.args.output_dir)) / "pvla_plans"
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot_plan(example.plan, example.words, folder / f"{name}-step-{step}.png")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_figure(tag, figure, step)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            callback._wandb.log({tag: callback._wandb.Image(figure), "train/global_step": step})
