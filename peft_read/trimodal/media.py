"""Frames and sound of media files with their time stamps, read with PyAV.

Frames are found by seeking, sound is mixed to one channel. Seconds are those of the file's own clock, which its
pictures and its sound share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


Path = str | os.PathLike[str]
# A path or an URL, or an open binary file.
Source = Path | IO[bytes]
# A jump in the time stamps of sound from which on it is a gap, in seconds; smaller ones are rounding.
GAP = 0.1


@dataclass(frozen=True)
class Frames:
    """Frames of a video.

    Attributes:
        images: `(height, width, 3)` each, uint8, RGB.
        times: `(frames, 2)`, from when to when each is shown, or stands for what was left out around it, in seconds;
            None if that isn't known.
    """

    images: Sequence[NDArray[np.uint8]]
    times: NDArray[np.float64] | None


@dataclass(frozen=True)
class Sound:
    """Sound of one channel.

    Attributes:
        samples: `(samples,)`, in [-1, 1]; as loud as it was given if it is a louder waveform.
        start: the second at which it begins.
    """

    samples: NDArray[np.float32]
    start: float = 0.0


def even_places(count: int, wanted: int) -> NDArray[np.int64]:
    """Indices of the frames in the middle of `wanted` equal parts of a video; all frames if there are fewer."""
    wanted = min(wanted, count)
    return ((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)


def read_frames(source: Source, wanted: int) -> NDArray[np.uint8]:
    """Frames of a video file, `(frames, height, width, 3)`, RGB: the images of `decode_frames`."""
    return np.stack(decode_frames(source, wanted).images)


def read_sound(source: Source, rate: int) -> NDArray[np.float32] | None:
    """Sound of a media file, `(samples,)` in [-1, 1], None if it has none: the samples of `decode_sound`."""
    sound = decode_sound(source, rate)
    return None if sound is None else sound.samples


def decode_frames(source: Source, wanted: int) -> Frames:
    """Frames of a video file, upright: those that are shown in the middle of equal parts of its time.

    Where the frame rate varies, a frame that is shown for long may stand for several parts. All frames are taken, each
    for its own time, if there are no more than wanted. Frames are looked up by seeking.

    Args:
        source: a path, an URL or an open file, in any format that FFmpeg knows.
        wanted: how many frames.

    Raises:
        ImportError: if PyAV isn't installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no video track or can't be decoded; the message names it.
    """
    with _opened(source) as container:
        stream = _video_of(container, source)
        shown = [_Shown.of(packet) for packet in container.demux(stream) if packet.size > 0 and not packet.is_discard]
        per_second = 1 / stream.time_base if stream.time_base else None
        rate = stream.average_rate or stream.guessed_rate or 25
    if any(each is None for each in shown) or per_second is None:  # packets without time stamps
        return _decode_all(source, wanted, float(rate))
    ordered = sorted((each for each in shown if each is not None), key=lambda each: each.begin)
    if not ordered:
        raise ValueError(f"{name_of(source)} has a video track, but no frame in it could be decoded.")
    begins = [each.begin for each in ordered]
    usual = _usual(begins, float(per_second) / float(rate))
    # How long the last one is shown stands in its packet alone, where some files have what no frame has, or nothing.
    end = begins[-1] + (ordered[-1].length if 4 * ordered[-1].length >= usual else usual)
    chosen, borders = _choose(begins, end, wanted)
    keys = [each.begin for each in ordered if each.is_key]
    images = _seek(source, [begins[index] for index in chosen], keys)
    return Frames(images, borders / float(per_second))


@dataclass(frozen=True)
class _Shown:
    """When a packet's frame begins to be shown and for how long, in the stream's units, and if it is a key frame."""

    begin: int
    length: int
    is_key: bool

    @classmethod
    def of(cls, packet: Any) -> _Shown | None:
        return None if packet.pts is None else cls(packet.pts, packet.duration or 0, packet.is_keyframe)


def _usual(begins: list[int], otherwise: float) -> int:
    """How long the two frames before the last are shown, the shorter time: one of them may be a still."""
    gaps = [after - before for before, after in pairwise(begins[-3:])]
    return max(1, min(gaps, default=round(otherwise)))


def _choose(begins: Sequence[int], end: int, wanted: int) -> tuple[list[int], NDArray[np.float64]]:
    """Indices of frames, and from when to when each counts, in whole units so that rounding doesn't choose."""
    count, wanted = len(begins), min(wanted, len(begins))
    if count == wanted:
        borders = np.array([*begins, end], np.float64)
        return list(range(count)), np.stack([borders[:-1], borders[1:]], -1)
    first, length = begins[0], end - begins[0]
    doubled = np.array(begins, dtype=object) * 2 * wanted  # Python's integers, which don't overflow
    middles = [first * 2 * wanted + (2 * part + 1) * length for part in range(wanted)]
    chosen = [int(np.searchsorted(doubled, middle, side="right")) - 1 for middle in middles]
    borders = first + length * np.arange(wanted + 1) / wanted
    return chosen, np.stack([borders[:-1], borders[1:]], -1)


def _seek(source: Source, wanted: list[int], keys: list[int]) -> list[NDArray[np.uint8]]:
    """The frames that begin at these times, rising, in the stream's units."""
    images: dict[int, NDArray[np.uint8]] = {}
    with _opened(source) as container:
        stream = _video_of(container, source)
        decoded, last, at = iter(container.decode(stream)), None, keys[0] if keys else 0
        for time in dict.fromkeys(wanted):
            key = max((each for each in keys if each <= time), default=at)
            if key > at:  # else it is nearer from here
                container.seek(key, stream=stream)
                decoded = iter(container.decode(stream))
            while last is None or at < time:
                frame = next(decoded, None)
                if frame is None:
                    break
                last, at = frame, time if frame.pts is None else frame.pts
            if last is None:
                raise ValueError(f"{name_of(source)} has a video track, but no frame in it could be decoded.")
            images[time] = upright(last, stream)
    return [images[time] for time in wanted]


def _decode_all(source: Source, wanted: int, rate: float) -> Frames:
    """Frames of a stream whose packets have no time stamps: by those of the frames, else by its frame rate."""
    with _opened(source) as container:
        times = [frame.time for frame in container.decode(_video_of(container, source))]
    if not times:
        raise ValueError(f"{name_of(source)} has a video track, but no frame in it could be decoded.")
    if None in times:
        times = [index / rate for index in range(len(times))]
    begins = [round(1e6 * time) for time in times]
    chosen, borders = _choose(begins, begins[-1] + _usual(begins, 1e6 / rate), wanted)
    with _opened(source) as container:
        stream = _video_of(container, source)
        decoded = enumerate(container.decode(stream))
        images = {index: upright(frame, stream) for index, frame in decoded if index in set(chosen)}
    return Frames([images[index] for index in chosen], borders / 1e6)


def upright(frame: Any, stream: Any, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A decoded frame as it is to be shown: turned and mirrored as its file says, its pixels made square.

    Args:
        frame: of PyAV.
        stream: that it comes from.
        size: height and width to scale it to, as shown; its own by default.

    Returns:
        `(height, width, 3)`, RGB.
    """
    across, down = _axes(frame)
    sideways = across[0] == 0
    height, width = size or upright_size(frame, stream)
    if sideways:
        height, width = width, height
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", height=height, width=width)
    if sideways:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image[:: sum(down), :: sum(across)])


def upright_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Height and width of a decoded frame of a stream as it is to be shown: wide pixels make it wider."""
    sideways = _axes(frame)[0][0] == 0
    height, width = frame.height, max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    return (width, height) if sideways else (height, width)


def _axes(frame: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Which way of the stored picture, right or down, is right in the shown one, and which is down; -1 for against it.

    They are the nearest to those of FFmpeg's display matrix, by which a stored point `(x, y)` is shown at
    `(a x + c y, b x + d y)`.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return (1, 0), (0, 1)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0), (0, -1 if d < 0 else 1)
    return (0, -1 if c < 0 else 1), (-1 if b < 0 else 1, 0)


def decode_sound(source: Source, rate: int) -> Sound | None:
    """Sound of a media file: the mean of its channels, but for that of low frequencies; gaps are silent.

    Args:
        source: a path, an URL or an open file, in any format that FFmpeg knows, with or without pictures.
        rate: samples a second to resample to.

    Returns:
        The sound and when it begins; None if the file has none.

    Raises:
        ImportError: if PyAV isn't installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file can't be decoded; the message names it.
    """
    with _opened(source) as container:
        if not container.streams.audio:
            return None
        parts: list[NDArray[np.float32]] = []
        start, length = 0.0, 0
        mixer = _Mixer(rate)
        for frame in container.decode(container.streams.audio[0]):
            time = frame.time
            if time is not None and not length:
                start = float(time)
            elif time is not None and (gap := time - start - (length + mixer.waiting) / rate) > GAP:
                parts.append(np.zeros(round(gap * rate), np.float32))
                length += len(parts[-1])
            for part in mixer(frame):
                parts.append(part)
                length += len(part)
        parts += mixer(None)
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return Sound(samples, start) if len(samples) else None


class _Mixer:
    """Resamples decoded sound and mixes its channels.

    Args:
        rate: samples a second to resample to.
        loudest: what sound is clipped to, from the overshoot of resampling.

    Attributes:
        waiting: how many samples have gone in and not yet come out, at the new rate.
    """

    def __init__(self, rate: int, loudest: float = 1.0) -> None:
        self.rate = rate
        self.loudest = loudest
        self.waiting = 0.0
        self._resampler: Any = None
        self._mixed: list[int] = []

    def __call__(self, frame: Any) -> list[NDArray[np.float32]]:
        if frame is not None and self._resampler is None:
            names = [channel.name for channel in frame.layout.channels]
            self._mixed = [index for index, name in enumerate(names) if name not in ("LFE", "LFE2")]
            self._mixed = self._mixed or list(range(len(names)))
            self._resampler = _av().AudioResampler(format="fltp", layout=frame.layout, rate=self.rate)
        if self._resampler is None:
            return []
        if frame is not None:
            self.waiting += frame.samples * self.rate / frame.sample_rate
        resampled = [part.to_ndarray() for part in self._resampler.resample(frame)]  # None gets what it still holds
        mixed = [
            np.clip(part[self._mixed].mean(0), -self.loudest, self.loudest).astype(np.float32) for part in resampled
        ]
        self.waiting -= sum(len(part) for part in mixed)
        return mixed


def resample(sound: NDArray[Any], rate: int, wanted: int) -> NDArray[np.float32]:
    """Sound at another rate.

    Args:
        sound: `(samples,)`, floats in [-1, 1]; if louder, it stays so.
        rate: its samples a second.
        wanted: samples a second to resample to.

    Returns:
        `(samples,)`.

    Raises:
        ImportError: if the rates differ and PyAV isn't installed.
    """
    sound = np.ascontiguousarray(sound, dtype=np.float32)
    if rate == wanted or not len(sound):
        return sound
    frame = _av().AudioFrame.from_ndarray(sound[None], format="flt", layout="mono")
    frame.sample_rate = rate
    mixer = _Mixer(wanted, max(1.0, float(np.abs(sound).max())))
    return np.concatenate([np.zeros(0, np.float32), *mixer(frame), *mixer(None)])


def is_source(item: Any) -> bool:
    """Whether this is a path, an URL or an open file."""
    return isinstance(item, str | os.PathLike) or (hasattr(item, "read") and hasattr(item, "seek"))


def name_of(source: Source) -> str:
    """What to call a source in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", "") or f"The {type(source).__name__}")


def _video_of(container: Any, source: Source) -> Any:
    """The first video track that isn't a cover."""
    attached = _av().stream.Disposition.attached_pic
    stream = next((each for each in container.streams.video if not each.disposition & attached), None)
    if stream is None:
        raise ValueError(f"{name_of(source)} has no video track.")
    return stream


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The file, opened; whatever is wrong with it names it."""
    av = _av()
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
    elif FilePath(source).is_dir():
        raise ValueError(f"{name_of(source)} is a folder, not a media file.")
    try:
        file = os.fspath(source) if isinstance(source, str | os.PathLike) else source
        with av.open(file, metadata_errors="ignore") as container:
            yield container
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {name_of(source)}.") from None
    except (av.error.FFmpegError, OverflowError, ZeroDivisionError, MemoryError) as error:
        raise ValueError(f"{name_of(source)} can't be read as a media file: {error}.") from error


def _av() -> ModuleType:
    try:
        import av
        import av.stream
    except ImportError as error:
        raise ImportError("Reading and resampling media needs PyAV: pip install av") from error
    return av
