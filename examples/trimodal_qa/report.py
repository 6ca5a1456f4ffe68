"""A picture of what the models found: frames, their sound, how much they counted, and the answers under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from peft_read.trimodal.media import read_frames, read_sound

from .annotations import length_of


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


RATE = 16000
LOUDNESS = 40  # decibels from the darkest to the brightest colour
NOTHING = "-"


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
    heights = [0.6, 0.8, 0.8, 0.25 * (1 + len(clips[0].answers))]
    figure, axes = plt.subplots(
        len(heights) * len(clips),
        1,
        figsize=(max(10, 0.4 * len(clips[0].truth)), sum(heights) * len(clips)),
        height_ratios=heights * len(clips),
        squeeze=False,
        layout="constrained",
    )
    for number, clip in enumerate(clips):
        rows = axes[len(heights) * number :, 0]
        _draw_frames(rows[0], clip)
        _draw_sound(rows[1], clip)
        _draw_importance(rows[2], clip)
        _draw_table(rows[3], clip)
    figure.savefig(path, dpi=95)
    plt.close(figure)


def _draw_frames(axis: Axes, clip: Shown) -> None:
    frames = read_frames(clip.video, len(clip.truth))
    strip = np.concatenate(list(frames), axis=1)
    axis.imshow(strip, extent=(0, len(frames), 0, 1), aspect="auto", interpolation="nearest")
    axis.set(title=f"“{clip.query}”", xticks=range(len(frames) + 1), xticklabels=[], yticks=[])


def _draw_sound(axis: Axes, clip: Shown) -> None:
    sound = read_sound(clip.video, RATE)
    if sound is None:
        axis.set_axis_off()
        return
    # Its end may lie beyond that of the pictures, as encoders fill up their last frame.
    end = len(clip.truth) * len(sound) / RATE / length_of(clip.video)
    with np.errstate(divide="ignore"):  # of silence
        spectrum, *_, image = axis.specgram(sound, NFFT=512, Fs=RATE, noverlap=256, xextent=(0, end))
    loudest = 10 * np.log10(spectrum.max() or 1)
    image.set_clim(loudest - LOUDNESS, loudest)
    axis.set(xlim=(0, len(clip.truth)), ylim=(0, RATE / 4), xticks=[], yticks=[], ylabel="sound")


def _draw_importance(axis: Axes, clip: Shown) -> None:
    if clip.importance is None:
        axis.set_axis_off()
        return
    levels, frames = clip.importance.shape
    image = axis.imshow(clip.importance, extent=(0, frames, levels, 0), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
    axis.set(xticks=[], yticks=np.arange(levels) + 0.5, yticklabels=range(1, levels + 1))
    axis.set_ylabel("importance\nat level", fontsize=8)


def _draw_table(axis: Axes, clip: Shown) -> None:
    rows = {"truth": clip.truth, **clip.answers}
    axis.set(xlim=(0, len(clip.truth)), ylim=(len(rows), 0), xticks=[], frame_on=False)
    axis.set_yticks(np.arange(len(rows)) + 0.5, labels=list(rows))
    axis.tick_params(left=False)
    for row, answers in enumerate(rows.values()):
        for frame, (answer, truth) in enumerate(zip(answers, clip.truth, strict=True)):
            if answer is None and truth is None:
                continue
            color = "black" if row == 0 else "tab:green" if answer == truth else "tab:red"
            axis.text(frame + 0.5, row + 0.5, answer or NOTHING, ha="center", va="center", color=color, fontsize=9)
