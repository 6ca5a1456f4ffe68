"""Every kind of sound that a processor is given, and what a feature extractor makes of it, in segments."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .media import Sound, decode_sound, is_source, resample
from .options import sample_rate


# Spectrograms of extractors that don't say what they do: Kaldi's windows, in seconds.
WINDOW, HOP = 0.025, 0.010
# An end that is shorter, such as what fills up a codec's last block, is no segment of its own.
SHORTEST_SEGMENT = 0.15
# Seconds that a tower is given at once that could hear for longer, at a cost that grows with the square.
LONGEST = 30.0
# Channels that a waveform may have at most; the other axis is time.
CHANNELS = 8
# Floats beyond this can't have been meant to lie in [-1, 1].
LOUDEST = 32.0


def sound_of(sound: Any, rate: int | None, wanted: int) -> Sound | None:
    """A sound of one channel at a rate.

    Args:
        sound: a path, an URL, an open file, its bytes, or a dict with `path` or `bytes`; a waveform `(samples,)`,
            `(channels, samples)` or `(samples, channels)`, floats in [-1, 1] or integers of 8 to 32 bits, as an array,
            a tensor or a list; a pair of a waveform and its rate; a dict with `array` (or `raw`) and `sampling_rate`,
            as of `datasets`; a decoder, or samples, of torchcodec. None, or nothing to be heard, for none.
        rate: samples a second of waveforms that come without.
        wanted: samples a second to resample to.

    Raises:
        TypeError: if it is none of these.
        ValueError: if a waveform's rate isn't known or no whole number, or it isn't a waveform.
    """
    if isinstance(sound, Mapping):
        array = sound.get("array", sound.get("raw"))
        if array is not None:
            return sound_of(array, sound.get("sampling_rate", rate), wanted)
        held = sound.get("bytes") or sound.get("path")
        if held is None and not {"array", "raw", "bytes", "path"} & sound.keys():
            raise ValueError(
                f"A dict for sound needs `array` and `sampling_rate`, or `path` or `bytes`, got one with "
                f"{sorted(sound)}."
            )
        sound = held
    if sound is None:
        return None
    if isinstance(sound, bytes | bytearray):
        sound = io.BytesIO(sound)
    if is_source(sound):
        return decode_sound(sound, wanted)
    if hasattr(sound, "get_all_samples"):
        sound = sound.get_all_samples()
    start = 0.0
    if hasattr(sound, "sample_rate") and hasattr(sound, "data"):
        sound, rate, start = sound.data, sound.sample_rate, float(getattr(sound, "pts_seconds", 0.0))
    elif isinstance(sound, tuple) and len(sound) == 2 and np.ndim(sound[1]) == 0:
        sound, rate = sound[0], sound[1]
    samples = _samples(sound)
    if rate is None:
        raise ValueError(
            "Give the `sampling_rate` of the waveforms in `audio`: without it nobody knows how long they are."
        )
    samples = resample(samples, sample_rate(rate), wanted)
    return Sound(samples, start) if len(samples) else None


def _samples(sound: Any) -> NDArray[np.float32]:
    """A waveform of one channel, floats in [-1, 1]."""
    if isinstance(sound, Tensor):
        sound = sound.detach().cpu()
        sound = (sound.float() if sound.dtype.is_floating_point else sound).numpy()
    if not isinstance(sound, np.ndarray | Sequence) or isinstance(sound, str):
        raise TypeError(
            f"Sound must be a path, bytes, a waveform, or a dict with its array and sampling rate, got a "
            f"{type(sound).__name__}."
        )
    values = np.asarray(sound)
    if not values.size:
        return np.zeros(0, np.float32)
    if values.ndim == 2 and min(values.shape) <= CHANNELS:
        values = _scaled(values).mean(int(values.shape[0] > values.shape[1]))
    elif values.ndim == 1:
        values = _scaled(values)
    else:
        raise ValueError(
            f"A waveform must be (samples,), (channels, samples) or (samples, channels), of {CHANNELS} channels at "
            f"most, got shape {values.shape}."
        )
    return values.astype(np.float32)


def _scaled(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers of any type as floats in [-1, 1]."""
    kind, bits = values.dtype.kind, values.dtype.itemsize * 8
    if kind == "i" and bits <= 32:
        return values / 2.0 ** (bits - 1)
    if kind == "u" and bits == 8:
        return (values - 128.0) / 128
    if kind != "f":
        raise ValueError(
            f"A waveform must hold floats in [-1, 1], or integers of 8, 16 or 32 bits whose range tells their scale, "
            f"got {values.dtype}."
        )
    if not np.abs(values).max() <= LOUDEST:
        raise ValueError(
            f"A waveform of floats must lie in [-1, 1], got values up to {np.abs(values).max():g}. Divide it by the "
            "range that it was recorded in, such as 32768, or give it as integers."
        )
    return values


def hears(extractor: Any) -> float | None:
    """How many seconds a feature extractor takes at most; None if as many as there are."""
    if (seconds := getattr(extractor, "max_length_s", None)) is not None:  # CLAP
        return float(seconds)
    if (seconds := getattr(extractor, "chunk_length", None)) is not None and hasattr(
        extractor, "n_samples"
    ):  # Whisper
        return float(seconds)
    if "max_length" in vars(extractor) and hasattr(extractor, "num_mel_bins"):  # AST
        return float(extractor.max_length * HOP)
    return None


def segment_length(extractor: Any, seconds: float | None) -> float:
    """Of how many seconds segments are.

    Args:
        extractor: the feature extractor.
        seconds: as asked for; None for as long as it hears, or `LONGEST`.

    Raises:
        ValueError: if that is longer than the extractor takes, which would leave out the rest.
    """
    most = hears(extractor)
    if seconds is None:
        return most or LONGEST
    if not 0 < seconds < np.inf or (most is not None and seconds > most):
        raise ValueError(
            f"`segment_seconds` must be positive and at most the {most or 'many'} seconds that a "
            f"{type(extractor).__name__} takes, got {seconds}."
        )
    return seconds


def features_of(extractor: Any, sounds: Sequence[Sound | None], seconds: float) -> dict[str, Tensor]:
    """What a tower hears of sounds: cut into segments, each processed by itself, filled up and masked.

    Args:
        extractor: the feature extractor.
        sounds: of each sample, None for silence that is masked out; of one at least there is some.
        seconds: length of a segment.

    Returns:
        `input_values` or `input_features (batch, ...)`, `audio_mask (batch, steps)` and `audio_times (batch, 2)`, when
        the first step begins and how long a step lasts; all with an axis of segments after the batch if a sound is
        longer than one.
    """
    rate = extractor.sampling_rate
    pieces = [[] if sound is None else _cut(extractor, sound.samples, seconds) for sound in sounds]
    most = max(1, *map(len, pieces))
    rows = [(row, index, piece) for row, each in enumerate(pieces) for index, piece in enumerate(each)]
    values, mask = _extract(extractor, [piece for _, _, piece in rows])
    features = values.new_zeros(len(sounds), most, *values.shape[1:])
    masks = torch.zeros(len(sounds), most, mask.shape[-1], dtype=torch.long)
    for (row, index, _), value, real in zip(rows, values, mask, strict=True):
        features[row, index], masks[row, index] = value, real
    starts = torch.tensor([0.0 if sound is None else sound.start for sound in sounds])
    begins = starts[:, None] + torch.arange(most) * (round(seconds * rate) / rate)
    times = torch.stack([begins, torch.full_like(begins, _step_seconds(extractor, values))], -1)
    if most == 1:
        features, masks, times = features[:, 0], masks[:, 0], times[:, 0]
    return {extractor.model_input_names[0]: features, "audio_mask": masks, "audio_times": times}


def _cut(extractor: Any, samples: NDArray[np.float32], seconds: float) -> list[NDArray[np.float32]]:
    """Segments of a waveform."""
    rate = extractor.sampling_rate
    length, least = round(seconds * rate), round(SHORTEST_SEGMENT * rate)
    # Kaldi's last windows reach beyond their segment: into the next one, rather than into nothing.
    beyond = round((WINDOW - HOP) * rate) if _is_kaldi(extractor) else 0
    starts = [start for start in range(0, len(samples), length) if start == 0 or len(samples) - start >= least]
    return [samples[start : start + length + beyond] for start in starts]


def _extract(extractor: Any, pieces: list[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Features `(rows, ...)` of waveforms, and which of their steps are real, `(rows, steps)`."""
    rate = extractor.sampling_rate
    least = round(4 * WINDOW * rate)  # what towers and extractors can make something of
    filled = [np.pad(piece, (0, max(0, least - len(piece)))) for piece in pieces]
    known = inspect.signature(extractor.__call__).parameters
    asked: dict[str, Any] = {"return_attention_mask": True} if "return_attention_mask" in known else {}
    if "padding" in known and known["padding"].default is False:
        asked["padding"] = True
    output = extractor(filled, sampling_rate=rate, return_tensors="pt", **asked)
    features: Tensor = output[extractor.model_input_names[0]]
    mask = output.get("attention_mask")
    lengths = torch.tensor([len(piece) for piece in pieces])
    hop = getattr(extractor, "hop_length", None)
    if mask is None or features.ndim == 4:  # CLAP repeats a short sound, which is heard once
        mask = torch.ones(len(features), features.shape[-2] if features.ndim == 4 else features.shape[1])
    if features.ndim == 2:
        counts = lengths
    elif hop is not None:
        counts = torch.div(lengths - 1, hop, rounding_mode="floor") + 1
    elif _step_seconds(extractor, features) == HOP:
        counts = torch.div(lengths - round(WINDOW * rate), round(HOP * rate), rounding_mode="floor") + 1
    else:
        counts = mask.sum(1)
    real = torch.arange(mask.shape[1]) < counts[:, None].clamp(min=1)
    return features, (mask.bool() & real).long()


def _is_kaldi(extractor: Any) -> bool:
    return not hasattr(extractor, "hop_length") and hasattr(extractor, "num_mel_bins")


def _step_seconds(extractor: Any, features: Tensor) -> float:
    """How long a step of the features lasts: a sample, or a frame of the spectrogram."""
    if features.ndim == 2:
        return 1 / extractor.sampling_rate
    hop = getattr(extractor, "hop_length", None)
    each = HOP if hop is None else hop / extractor.sampling_rate
    return each * getattr(extractor, "stride", 1)
