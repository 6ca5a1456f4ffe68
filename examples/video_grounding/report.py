"""A picture of what the model found: frames, true moments and predicted saliency over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from peft_read.pvla.picture import ExamplePlan


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def draw_saliency(
    path: Path,
    videos: Sequence[np.ndarray],
    queries: Sequence[str],
    labels: Sequence[np.ndarray],
    saliency: dict[str, Sequence[np.ndarray]],
    clip_seconds: float,
    plans: Sequence[ExamplePlan] = (),
) -> None:
    """Draw a few videos below each other.

    Args:
        path: the PNG to write.
        videos: the frame of each clip, `(clips, height, width, 3)` a video.
        queries: the sentence about each video.
        labels: 1 for every clip that it means, `(clips,)` a video.
        saliency: by method, the logit of every clip, `(clips,)` a video.
        clip_seconds: length of a clip.
        plans: what PVLA's transport moves from each clip to each word, if there is such a thing.
    """
    heights = [1, 1.6, 0.8] if plans else [1, 1.6]
    figure, axes = plt.subplots(
        len(heights) * len(videos),
        1,
        figsize=(13, sum(heights) * len(videos)),
        height_ratios=heights * len(videos),
        squeeze=False,
        layout="constrained",
    )
    for row, (frames, query, truth) in enumerate(zip(videos, queries, labels, strict=True)):
        rows = axes[len(heights) * row :, 0]
        _draw_frames(rows[0], frames, f"“{query}”", clip_seconds)
        scores = {method: values[row] for method, values in saliency.items()}
        _draw_scores(rows[1], truth, scores, clip_seconds, legend=row == 0)
        if plans:
            _draw_plan(rows[2], plans[row], clip_seconds)
    axes[-1, 0].set_xlabel("seconds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_frames(axis: Axes, frames: np.ndarray, title: str, clip_seconds: float) -> None:
    height, width = frames.shape[1:3]
    end = len(frames) * clip_seconds
    strip = np.concatenate(list(frames), axis=1)
    axis.imshow(strip, extent=(0, end, 0, height / width * clip_seconds), interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])


def _draw_scores(
    axis: Axes, truth: np.ndarray, scores: dict[str, np.ndarray], clip_seconds: float, *, legend: bool
) -> None:
    edges = np.arange(len(truth) + 1) * clip_seconds
    axis.stairs(truth, edges, fill=True, color="tab:green", alpha=0.25, label="true moment")
    for method, logits in scores.items():
        probability = 1 / (1 + np.exp(-logits))
        axis.plot((edges[:-1] + edges[1:]) / 2, probability, marker="o", markersize=3, label=method)
    axis.set(xlim=(0, edges[-1]), ylim=(0, 1.05), ylabel="saliency")
    if legend:
        axis.legend(loc="upper right", ncols=len(scores) + 1)


def _draw_plan(axis: Axes, example: ExamplePlan, clip_seconds: float) -> None:
    clips, words = example.plan.shape
    extent = (0, clips * clip_seconds, words - 0.5, -0.5)
    axis.imshow(example.plan.float().cpu().T, extent=extent, aspect="auto", vmin=0, interpolation="nearest")
    axis.set_yticks(range(words), labels=example.words or [])
