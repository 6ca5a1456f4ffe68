"""A picture of what the models found: frames, their sound, how much they counted, and the answers under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from peft_read import plot_importance


@dataclass(frozen=True)
class Shown:
    """A clip to be shown.

    Attributes:
        video: its file.
        query: the question.
        truth: `(frames,)`, the answer of each frame, None where there is none.
        answers: by method, what it answers, `(frames,)`.
        importance: `(levels, frames)`, how much each frame counted; None without a filter.
    """

    video: Path
    query: str
    truth: Sequence[str | None]
    answers: Mapping[str, Sequence[str | None]]
    importance: np.ndarray | None


def draw_answers(path: Path, clips: Sequence[Shown]) -> None:
    """Draw clips below each other.

    Args:
        path: the PNG to write.
        clips: what to draw.
    """
    height = 3.2 + 0.25 * (1 + len(clips[0].answers))
    figure = Figure(figsize=(max(10, 0.4 * len(clips[0].truth)), height * len(clips)), layout="constrained")
    for part, clip in zip(np.atleast_1d(figure.subfigures(len(clips))), clips, strict=True):
        plot_importance(
            None if clip.importance is None else list(torch.from_numpy(clip.importance)),
            clip.video,
            frames=len(clip.truth),
            answers={"truth": clip.truth, **clip.answers},
            title=f"“{clip.query}”",
            figure=part,
        )
    figure.savefig(path, dpi=95)
