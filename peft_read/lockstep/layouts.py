"""Where time is in the tokens of a tower, and which of them are padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How the tokens of a tower's hidden states lie in time.

    Hidden states are `(batch, tokens, dim)` and begin with `prefix` tokens that aren't in time. Those of towers that
    take the frames of a video as one batch are `(batch * steps, tokens, dim)`, whatever `order` says, and a frame's
    tokens all belong to it. Grids of tokens `(rows, height, width, dim)` count as flattened.

    Args:
        order: `"time_major"`: all tokens of a step, then those of the next; `"time_fastest"`: a token of each step,
            then another of each; `"stacked"`: a square whose rows, `pieces` times as many as a step has tokens, are
            pieces of the time axis on top of each other; `"words"`: not in time, a token for each of the tower's
            inputs, as in text; `"none"`: not in time, nor a token's place told.
        prefix: tokens before those in time, such as a class token.
        steps: time steps; None for one a token, or as many as the square has.
        pieces: into how many the time axis of a stacked layout is cut.
    """

    order: Literal["time_major", "time_fastest", "stacked", "words", "none"]
    prefix: int = 0
    steps: int | None = None
    pieces: int = 1

    def split(self, hidden: Tensor, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Sort tokens by time.

        Args:
            hidden: `(batch, tokens, dim)` or `(batch * steps, tokens, dim)`.
            batch: number of samples.

        Returns:
            `(batch, steps, tokens of a step, dim)` of the tokens in time, and `(batch, tokens, dim)` of the others;
            None where there are none.

        Raises:
            ValueError: if the number of tokens doesn't fit the number of steps.
        """
        dim = hidden.shape[-1]
        if hidden.shape[0] != batch:
            if self.steps is None or hidden.shape[0] != batch * self.steps:
                raise ValueError(f"{self} doesn't fit hidden states {tuple(hidden.shape)} of {batch} samples.")
            return hidden.reshape(batch, self.steps, -1, dim), None
        tokens = hidden.reshape(batch, -1, dim)
        if self.order in ("words", "none"):
            return None, tokens
        timed = tokens[:, self.prefix :]
        if self.order == "stacked":
            side = math.isqrt(timed.shape[1])
            if side * side != timed.shape[1] or side % self.pieces:
                raise ValueError(f"{self} doesn't fit hidden states {tuple(hidden.shape)} of {batch} samples.")
            grid = timed.reshape(batch, self.pieces, side // self.pieces, side, dim)
            return grid.transpose(2, 3).flatten(1, 2), None
        steps = timed.shape[1] if self.steps is None else self.steps
        if steps == 0 or timed.shape[1] % steps:
            raise ValueError(f"{self} doesn't fit hidden states {tuple(hidden.shape)} of {batch} samples.")
        if self.order == "time_major":
            timed = timed.reshape(batch, steps, -1, dim)
        else:
            timed = timed.reshape(batch, -1, steps, dim).transpose(1, 2)
        return timed, tokens[:, : self.prefix] if self.prefix else None

    def join(self, timed: Tensor | None, untimed: Tensor | None, shape: torch.Size) -> Tensor:
        """The inverse of `split`.

        Args:
            timed: `(batch, steps, tokens of a step, dim)`, or None.
            untimed: `(batch, tokens, dim)`, or None.
            shape: of the hidden states that were split, but for the last dimension.

        Returns:
            `(*shape[:-1], dim)`.
        """
        parts = [] if untimed is None else [untimed]
        if timed is not None:
            if self.order == "time_fastest":
                timed = timed.transpose(1, 2)
            elif self.order == "stacked":
                timed = timed.unflatten(1, (self.pieces, -1)).transpose(2, 3).flatten(1, 2)
            parts.append(timed.flatten(1, 2))
        tokens = torch.cat(parts, 1)
        return tokens.reshape(*shape[:-1], tokens.shape[-1])


# By `model_type`: the layout, given the configuration and how many steps the input has (frames of a video, or of a
# spectrogram). Towers not listed here: images take frames as a batch, sound has a token a step, text has no time.
LAYOUTS: dict[str, Callable[[Any, int], Layout]] = {
    "timesformer": lambda config, steps: Layout("time_fastest", prefix=1, steps=steps),
    "videomae": lambda config, steps: Layout("time_major", steps=_tubelets(config.tubelet_size, steps)),
    "videoprism_vision_model": lambda config, steps: Layout("time_major", steps=steps),
    "vivit": lambda config, steps: Layout("time_major", prefix=1, steps=_tubelets(config.tubelet_size[0], steps)),
    "vjepa2": lambda config, steps: Layout("time_major", steps=_tubelets(config.tubelet_size, steps)),
    # A spectrogram's patches, row by row of frequencies.
    "audio-spectrogram-transformer": lambda config, steps: Layout(
        "time_fastest", prefix=2, steps=(steps - config.patch_size) // config.time_stride + 1
    ),
    # A spectrogram is cut into pieces that are put on top of each other to make a square image.
    "clap_audio_model": lambda config, steps: Layout("stacked", pieces=config.spec_size // config.num_mel_bins),
}
# By `model_type`: by how many input steps the tokens in time are apart, and how many each is made of, where the former
# don't divide the input evenly.
STRIDES: dict[str, Callable[[Any], tuple[int, int]]] = {
    "audio-spectrogram-transformer": lambda config: (config.time_stride, config.patch_size),
}
# By `model_type`: vision towers that take videos, beside those whose main input is named so.
TAKE_VIDEOS = ("timesformer", "videomae", "vivit")
# Image towers that mix the frames of a video, or video towers: of how many frames, as the configuration's attribute.
FIXED_FRAMES = {"videomae": "num_frames", "vivit": "num_frames", "xclip_vision_model": "num_frames"}
# By `model_type`: how many steps of the blocks have some valid sound, given the configuration and how many valid steps
# the input has. Others are asked by their own method, see `step_mask`.
VALID_STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "audio-spectrogram-transformer": lambda config, steps: (steps - 1) // config.time_stride + 1,
    "moonshine": lambda config, steps: ((((steps - 127) // 64 + 1) - 7) // 3 + 1 - 3) // 2 + 1,
}


def takes_videos(tower: nn.Module) -> bool:
    """Whether a vision tower takes whole videos `(batch, frames, channels, height, width)` rather than images."""
    return _model_type(tower) in TAKE_VIDEOS or getattr(tower, "main_input_name", "") == "pixel_values_videos"


def layout_of(tower: nn.Module, modality: str, steps: int) -> Layout:
    """The layout of a tower's hidden states, at all of its blocks.

    Args:
        tower: the tower; its configuration's `model_type` is looked up in `LAYOUTS`.
        modality: `"vision"`, `"audio"` or `"text"`.
        steps: how many steps the tower's input has, padding included: frames of video; samples of a waveform, or
            frames of a spectrogram; text tokens.

    Raises:
        ValueError: if the tower can't take that many frames, or takes videos and isn't known.
    """
    model_type = _model_type(tower)
    if modality == "vision":
        _check_frames(tower, steps)
    if model_type in LAYOUTS:
        return LAYOUTS[model_type](getattr(tower, "config", None), steps)
    if modality == "vision" and takes_videos(tower):
        raise ValueError(
            f"Where time lies in the tokens of a {type(tower).__name__} isn't known. Say it in "
            f"peft_read.lockstep.layouts.LAYOUTS[{model_type!r}], as for the video towers there."
        )
    if modality == "vision":
        return Layout("time_major", steps=steps)
    return Layout("time_major" if modality == "audio" else "words")


def step_mask(tower: nn.Module, mask: Tensor, steps: int) -> Tensor:
    """Which time steps of a tower's tokens are real, given which steps of its input are.

    Where the tower tells how its convolutions shorten the input (speech), it is asked, and takes padding to be on the
    right. Else a step is real if any of its inputs is, as a tubelet of two frames.

    Args:
        tower: the tower.
        mask: `(batch, input steps)`, bool, true where real.
        steps: time steps of the tokens.

    Returns:
        `(batch, steps)`, bool.
    """
    valid_steps = _valid_steps_of(tower)
    if valid_steps is not None and mask.shape[1] != steps:
        total = int(valid_steps(torch.tensor([mask.shape[1]]))[0])
        mask = torch.arange(total, device=mask.device) < valid_steps(mask.sum(1))[:, None]
    return _resample(mask, steps)


def step_centers(tower: nn.Module, inputs: int, steps: int) -> tuple[Tensor, float]:
    """Where the time steps of a tower's tokens lie on the axis of its input.

    Args:
        tower: the tower.
        inputs: steps of its input, padding included.
        steps: time steps of the tokens.

    Returns:
        `(steps,)`, the middle of each step in steps of the input, and by how many of these they are apart.
    """
    each = inputs / steps
    known = STRIDES.get(_model_type(tower))
    if known is not None:
        stride, size = known(tower.config)
        if (inputs - size) // stride + 1 == steps:
            return torch.arange(steps) * stride + size / 2, float(stride)
    return (torch.arange(steps) + 0.5) * each, each


def token_mask(mask: Tensor, tokens: int) -> Tensor:
    """Which tokens of a text tower are real at a block, where towers may pad (Longformer) or join them (Funnel).

    Args:
        mask: `(batch, words)`, bool, true where real.
        tokens: of the hidden states.

    Returns:
        `(batch, tokens)`, bool; a token that joins others is real if all of these are.
    """
    if tokens >= mask.shape[1]:
        return F.pad(mask, (0, tokens - mask.shape[1]))
    return ~_resample(~mask, tokens)


def _resample(mask: Tensor, steps: int) -> Tensor:
    """`(batch, steps)`: whether any step is true of those that each stands for."""
    if mask.shape[1] == steps:
        return mask
    each, left = divmod(mask.shape[1], steps)
    if left < each:
        mask = mask[:, : each * steps]  # convolutions drop what doesn't fill a step
    return F.adaptive_max_pool1d(mask[:, None].float(), steps)[:, 0].bool()


def _valid_steps_of(tower: nn.Module) -> Callable[[Tensor], Tensor] | None:
    config = getattr(tower, "config", None)
    if (known := VALID_STEPS.get(_model_type(tower))) is not None:
        return lambda steps: known(config, steps)
    for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
        if (own := getattr(tower, name, None)) is not None:
            return lambda steps: _first(own(steps))
    return None


def _first(lengths: Any) -> Tensor:
    """Of the lengths before and after a pooling that comes behind the blocks."""
    return lengths[0] if isinstance(lengths, tuple) else lengths


def _check_frames(tower: nn.Module, frames: int) -> None:
    attribute = FIXED_FRAMES.get(_model_type(tower))
    expected = getattr(getattr(tower, "config", None), attribute, frames) if attribute else frames
    if frames != expected:
        raise ValueError(
            f"A {type(tower).__name__} with {attribute}={expected} can't take videos of {frames} frames: give it "
            f"{expected}, padded and with a `frame_mask` where a video has fewer."
        )


def _tubelets(size: int, frames: int) -> int:
    return max(frames // size, 1)


def _model_type(tower: nn.Module) -> str:
    return getattr(getattr(tower, "config", None), "model_type", "")
