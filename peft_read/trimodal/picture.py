"""A picture of what counted in a clip: its frames, its sound, importance by level, and answers under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .media import Frames, Sound
from .pictures import frames_of
from .sounds import sound_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


RATE = 16_000
LOUDNESS = 40  # decibels from the darkest to the brightest colour of the spectrogram
HIGHEST = RATE / 4  # Hz at its top
NO_ANSWER = "-"
Answers = str | Sequence[str | None]


def plot_importance(
    importance: Sequence[Tensor] | None,
    video: Any = None,
    audio: Any = "video",
    *,
    frames: int | None = None,
    answers: Mapping[str, Answers] | None = None,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
    path: str | Path | None = None,
) -> Figure | SubFigure:
    """Draw how much each frame of a clip counted at each level, below the frames and the sound. Needs matplotlib.

    Args:
        importance: for each level `(time steps,)` in [0, 1], such as `[level[0] for level in
            model.get_frame_importance()]`, without padding; None to leave it out, where there is no filter.
        video: the clip, as a `TrimodalProcessor` takes it; None to leave the frames out.
        audio: its sound, likewise; by default the sound track of the video, if that is a file with one. None for none.
        frames: how many frames the model was given, where a time step is several; by default one for each step.
        answers: by name, a text for each frame, None where there is none, or one text for the clip. Answers other than
            those of `"truth"` are green where they equal these and red where not.
        title: such as the question.
        figure: where to draw, such as a part of a larger figure; by default a new one.
        path: file to write, by its ending; none is written by default.

    Returns:
        The figure, with time in seconds where the video knows it.

    Raises:
        ImportError: if matplotlib isn't installed.
        ValueError: if levels have different lengths, or answers don't fit the frames.

    Example:
        >>> import torch
        >>> levels = [torch.tensor([0.9, 0.1, 1.0]), torch.tensor([0.8, 0.0, 1.0])]
        >>> figure = plot_importance(levels, answers={"truth": ["cat", None, "dog"], "model": ["cat", None, None]})
        >>> [label.get_text() for label in figure.axes[1].get_yticklabels()]
        ['truth', 'model']
    """
    values = None if importance is None else _levels(importance)
    count = frames or (8 if values is None else values.shape[1])
    shown = None if video is None else frames_of(video, count)
    count = count if shown is None else len(shown.images)
    rows = {name: _each(name, answer, count) for name, answer in (answers or {}).items()}
    heard = _sound(video, audio)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures of importance need matplotlib: pip install matplotlib") from error
    heights = {
        "frames": 0.8 if shown is not None else 0.0,
        "sound": 0.8 if heard is not None else 0.0,
        "levels": 0.3 + 0.2 * len(values) if values is not None else 0.0,
        "answers": 0.1 + 0.25 * len(rows) if rows else 0.0,
    }
    panels = [height for height in heights.values() if height]
    if figure is None:
        figure = Figure(figsize=(max(6.0, min(0.6 * count, 30.0)), 0.6 + sum(panels)), layout="constrained")
    all_axes = list(figure.subplots(len(panels), 1, height_ratios=panels, squeeze=False, sharex=True)[:, 0])
    borders = _borders(shown, heard, count)
    if title:
        all_axes[0].set_title(title)
    axes = iter(all_axes)
    if shown is not None:
        _draw_frames(next(axes), shown, borders)
    if heard is not None:
        _draw_sound(next(axes), heard)
    if values is not None:
        _draw_levels(next(axes), values, borders)
    if rows:
        _draw_answers(next(axes), rows, borders)
    for axis in all_axes:
        axis.set_xlim(borders[0], borders[-1])
        axis.tick_params(bottom=axis is all_axes[-1])
    known = shown is not None and shown.times is not None
    all_axes[-1].set_xlabel("seconds" if known or heard is not None else "frames")
    if path is not None:
        if not isinstance(figure, Figure):
            raise ValueError("Only a whole figure can be written: save the one that this is a part of.")
        figure.savefig(path, dpi=100)
    return figure


def _levels(importance: Sequence[Tensor]) -> NDArray[np.float32]:
    """`(levels, steps)`."""
    levels = [torch.as_tensor(level).detach().float().cpu() for level in importance]
    shapes = {tuple(level.shape) for level in levels}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not len(levels[0]):
        raise ValueError(
            f"Give for each level the importance of one clip's frames, (frames,), got {sorted(shapes) or 'none'}: of "
            "a batch, `[level[0] for level in model.get_frame_importance()]` is the first clip's."
        )
    values: NDArray[np.float32] = torch.stack(levels).numpy()
    return values


def _each(name: str, answer: Answers, count: int) -> list[tuple[float, str]]:
    """Texts and where they stand, in frames."""
    if isinstance(answer, str):
        return [(count / 2, answer)]
    if len(answer) != count:
        raise ValueError(f"{len(answer)} answers of {name!r} for {count} frames.")
    return [(place + 0.5, text or NO_ANSWER) for place, text in enumerate(answer)]


def _sound(video: Any, audio: Any) -> Sound | None:
    if not isinstance(audio, str) or audio != "video":
        return sound_of(audio, None, RATE)
    is_file = isinstance(video, str | Path | bytes | dict) or hasattr(video, "read")
    return sound_of(video, None, RATE) if is_file else None


def _borders(shown: Frames | None, heard: Sound | None, count: int) -> NDArray[np.float64]:
    """Where frames begin, and where the last one ends: in seconds, or evenly."""
    if shown is not None and shown.times is not None:
        return np.array([*shown.times[:, 0], shown.times[-1, 1]])
    if heard is not None:
        return heard.start + np.arange(count + 1) * len(heard.samples) / RATE / count
    return np.arange(count + 1.0)


def _draw_frames(axis: Axes, shown: Frames, borders: NDArray[np.float64]) -> None:
    for image, left, right in zip(shown.images, borders, borders[1:], strict=False):
        axis.imshow(image, extent=(left, right, 0, 1), aspect="auto", interpolation="antialiased")
    axis.set(ylim=(0, 1), yticks=[])


def _draw_sound(axis: Axes, heard: Sound) -> None:
    samples = np.pad(heard.samples, (0, max(0, 512 - len(heard.samples))))
    end = heard.start + len(samples) / RATE
    with np.errstate(divide="ignore"):  # of silence
        spectrum, *_, image = axis.specgram(samples, NFFT=512, Fs=RATE, noverlap=256, xextent=(heard.start, end))
    loudest = 10 * np.log10(spectrum.max() or 1)
    image.set_clim(loudest - LOUDNESS, loudest)
    axis.set(ylim=(0, HIGHEST), yticks=[], ylabel="sound")


def _draw_levels(axis: Axes, values: NDArray[np.float32], borders: NDArray[np.float64]) -> None:
    levels, steps = values.shape
    places = np.linspace(0, len(borders) - 1, steps + 1)  # a step may be several frames
    edges = np.interp(places, np.arange(len(borders)), borders)
    image = axis.pcolormesh(edges, np.arange(levels + 1), values, vmin=0, vmax=1, cmap="viridis")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
    axis.set(ylim=(levels, 0), yticks=np.arange(levels) + 0.5, yticklabels=range(1, levels + 1))
    axis.set_ylabel("importance\nat level", fontsize=8)


def _draw_answers(axis: Axes, rows: Mapping[str, list[tuple[float, str]]], borders: NDArray[np.float64]) -> None:
    axis.set(ylim=(len(rows), 0), frame_on=False)
    axis.set_yticks(np.arange(len(rows)) + 0.5, labels=list(rows))
    axis.tick_params(left=False)
    truth = dict(rows.get("truth", []))
    for row, (name, texts) in enumerate(rows.items()):
        for place, text in texts:
            if text == NO_ANSWER == truth.get(place, NO_ANSWER):
                continue
            color = "black"
            if name != "truth" and place in truth:
                color = "tab:green" if text == truth[place] else "tab:red"
            second = float(np.interp(place, np.arange(len(borders)), borders))
            axis.text(second, row + 0.5, text, ha="center", va="center", color=color, fontsize=9, clip_on=True)
