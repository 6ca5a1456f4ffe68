"""Transport plans as pictures, in files and where a Trainer logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from .loss import PvlaDetails
from .states import VideoTextStates


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure = Figure(figsize=(2 + 0.28 * frames, 1.2 + 0.28 * columns), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(plan.detach().float().cpu().T, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(xlabel="frame", ylabel="word")
    if words is not None:
        axes.set_yticks(range(columns), labels=words)
    figure.colorbar(image, ax=axes, label="share of the mass")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def example_plan(
    sample: int, details: PvlaDetails, states: VideoTextStates, batch: Mapping[str, Any], tokenizer: Any
) -> ExamplePlan:
    """The plan of one of a batch's samples.

    Args:
        sample: its row.
        details: what the loss found.
        states: what it was given.
        batch: what the model was given; its `input_ids` are the words' names, if there are as many.
        tokenizer: a tokenizer, a processor that has one, or nothing that could name words.
    """
    plan = details.plan[sample].detach()
    for axis, mask in ((0, states.frame_mask), (1, states.word_mask)):
        if mask is not None:
            plan = plan.index_select(axis, mask[sample].nonzero()[:, 0])
    ids, tokenizer = batch.get("input_ids"), getattr(tokenizer, "tokenizer", tokenizer)
    if ids is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return ExamplePlan(plan, None)
    mask = batch.get("text_token_mask", batch.get("attention_mask"))
    if mask is not None:
        ids = ids[:, : mask.shape[1]][sample][mask[sample, : ids.shape[1]].bool()]
    words = tokenizer.convert_ids_to_tokens(ids.flatten().tolist())
    return ExamplePlan(plan, words if len(words) == plan.shape[1] else None)


def log_plan(trainer: Trainer, example: ExamplePlan) -> None:
    """Draw a plan into `output_dir/pvla_plans/step-N.png`, and send it to TensorBoard and W&B where they are used."""
    step, tag = trainer.state.global_step, "pvla/plan"
    folder = Path(str(trainer.args.output_dir)) / "pvla_plans"
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot_plan(example.plan, example.words, folder / f"step-{step}.png")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_figure(tag, figure, step)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            callback._wandb.log({tag: callback._wandb.Image(figure), "train/global_step": step})
