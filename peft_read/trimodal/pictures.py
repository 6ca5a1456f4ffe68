"""Every kind of video that a processor is given, as frames to be processed: files, arrays, images, decoders."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .media import Frames, decode_frames, even_places, is_source


CHANNELS = (1, 3, 4)
# Floats in [0, 1] may be this large once they were resized, and those in [0, 255] are at least as bright as that.
OVERSHOOT, DARKEST = 1.1, 2.0


def frames_of(video: Any, wanted: int, fps: float | None = None) -> Frames | None:
    """Sampled frames of a video, evenly over its time; all if there are no more.

    Args:
        video: a path, an URL, an open file, its bytes, or a dict with `path` or `bytes`; frames as an array or tensor
            `(frames, height, width, channels)` or `(frames, channels, height, width)`, grey, RGB or RGBA, integers up
            to 255 or floats in [0, 1] or in [0, 255], which the greatest one tells; a list of images, arrays or paths
            of images, or one image; a decoder or a batch of frames of torchcodec. None, or an empty dict, for none.
        wanted: how many frames.
        fps: frames a second of frames that come without times.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it has no frames, or they aren't pictures.
    """
    if isinstance(video, Mapping):
        held = video.get("bytes") or video.get("path")
        if held is None and not {"bytes", "path"} & video.keys():
            raise ValueError(f"A dict for a video needs `path` or `bytes`, got one with {sorted(video)}.")
        video = held
    if video is None:
        return None
    if isinstance(video, bytes | bytearray):
        video = io.BytesIO(video)
    if is_source(video):
        return decode_frames(video, wanted)
    if hasattr(video, "get_frames_played_at"):
        return _of_decoder(video, wanted)
    if hasattr(video, "pts_seconds") and hasattr(video, "data"):
        return _of_frame_batch(video, wanted)
    if _is_image(video):
        video = [video]
    count = len(video) if isinstance(video, Sequence | np.ndarray | Tensor) else None
    if count is None:
        raise TypeError(
            f"A video must be a path, bytes, frames as an array, a tensor or a list of images, got a "
            f"{type(video).__name__}."
        )
    if not count:
        raise ValueError("A video has no frames; give None for a sample without video.")
    places = even_places(count, wanted)
    images = _of_list(video, places) if isinstance(video, list | tuple) else _array(video, places)
    times = None
    if fps is not None:
        borders = np.arange(len(places) + 1) * (count / fps / len(places))
        times = np.stack([borders[:-1], borders[1:]], -1)
    return Frames(images, times)


def _of_decoder(video: Any, wanted: int) -> Frames:
    """Frames from a decoder of torchcodec, by their time."""
    about = video.metadata
    begin, end = float(about.begin_stream_seconds), float(about.end_stream_seconds)
    wanted = min(wanted, len(video))
    borders = begin + (end - begin) * np.arange(wanted + 1) / wanted
    middles = (borders[:-1] + borders[1:]) / 2
    batch = video.get_frames_played_at(seconds=middles.tolist())
    return Frames(_array(batch.data, np.arange(wanted)), np.stack([borders[:-1], borders[1:]], -1))


def _of_frame_batch(video: Any, wanted: int) -> Frames:
    """Frames of a batch of torchcodec, with their own times."""
    places = even_places(len(video.data), wanted)
    begins = np.asarray(video.pts_seconds, np.float64)
    ends = begins + np.asarray(video.duration_seconds, np.float64)
    parts = [begins[places[0]], *((begins[a] + begins[b]) / 2 for a, b in pairwise(places))]
    borders = np.array([*parts, ends[places[-1]]])
    if len(places) == len(begins):
        borders = np.array([*begins, ends[-1]])
    return Frames(_array(video.data, places), np.stack([borders[:-1], borders[1:]], -1))


def _is_image(item: Any) -> bool:
    return hasattr(item, "convert") and hasattr(item, "getbands")


def _of_list(video: Sequence[Any], places: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Some pictures of a list, `(height, width, 3)` each; all of its floats are measured alike."""
    frames = {int(place): _frame(video[place]) for place in places}
    others = [_frame(item) for at, item in enumerate(video) if at not in frames and _may_be_floats(item)]
    ranges = [range_ for frame in [*frames.values(), *others] if (range_ := _range_of_floats(frame)) is not None]
    limits = (float(np.min(ranges)), float(np.max(ranges))) if ranges else None
    return [_array(frame[None], np.arange(1), limits)[0] for frame in frames.values()]


def _frame(item: Any) -> NDArray[Any] | Tensor:
    """One picture, as an image of PIL, turned as its camera was held; its path; an array: with its channels."""
    if is_source(item):
        from PIL import Image

        item = Image.open(item)
    if _is_image(item):
        from PIL import ImageOps

        item = ImageOps.exif_transpose(item)
        item = np.asarray(item if _is_deep(item) else item.convert("RGB"))
    frame = item if isinstance(item, Tensor) else np.asarray(item)
    if frame.ndim not in (2, 3):
        raise ValueError(
            f"A frame must be (height, width), (height, width, channels) or (channels, height, width), got shape "
            f"{tuple(frame.shape)}."
        )
    return frame[..., None] if frame.ndim == 2 else frame


def _is_deep(image: Any) -> bool:
    """Whether an image of PIL has more than 8 bits, which its conversion would cut off rather than scale."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _may_be_floats(item: Any) -> bool:
    return item.mode == "F" if _is_image(item) else not is_source(item)


def _range_of_floats(frame: NDArray[Any] | Tensor) -> tuple[float, float] | None:
    """The least and the greatest of a picture's floats; None for integers, whose type tells how they are measured."""
    is_float = frame.dtype.is_floating_point if isinstance(frame, Tensor) else frame.dtype.kind == "f"
    return (float(frame.min()), float(frame.max())) if is_float and 0 not in frame.shape else None


def _array(
    video: Any, places: NDArray[np.int64], limits: tuple[float, float] | None = None
) -> list[NDArray[np.uint8]]:
    """Some frames of an array or tensor, `(height, width, 3)` each; `limits` are those of more floats than its own."""
    is_tensor = isinstance(video, Tensor)
    shape = tuple(video.shape)
    if len(shape) == 3 and shape[0] not in CHANNELS and shape[-1] not in CHANNELS:
        video, shape = video[..., None], (*shape, 1)  # grey
    if len(shape) != 4 or (shape[1] not in CHANNELS and shape[-1] not in CHANNELS):
        raise ValueError(
            "Frames must be (frames, height, width, channels) or (frames, channels, height, width) with 1, 3 or 4 "
            f"channels, got shape {shape}."
        )
    # Either may be the channels of very small pictures: then tensors have them first, as torch does.
    first = shape[1] in CHANNELS and (is_tensor or shape[-1] not in CHANNELS)
    if is_tensor:
        video = video.detach().cpu()
        video = video.float() if video.dtype.is_floating_point else video
    values = np.asarray(video)
    values = _as_bytes(values, places, limits)
    if first:
        values = np.moveaxis(values, 1, -1)
    values = values.repeat(3, -1) if values.shape[-1] == 1 else values[..., :3]
    return list(np.ascontiguousarray(values))


def _as_bytes(
    values: NDArray[Any], places: NDArray[np.int64], limits: tuple[float, float] | None
) -> NDArray[np.uint8]:
    """The frames at some places in 0 to 255, whatever they are measured in."""
    if values.dtype == np.uint8:
        return values[places]
    if values.dtype == bool:
        return values[places].astype(np.uint8) * 255
    is_float = values.dtype.kind == "f"
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if is_float and limits is not None:
        low, high = limits
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"Frames must be integers up to 255, or floats in [0, 1] or [0, 255], got {values.dtype} from {low:g} to "
            f"{high:g}. Give pictures as they were before normalisation: the image processor normalises them. Scale "
            "those of 16 bits to 8, as by `(frames / 257).round().astype('uint8')`; clip what resizing left outside."
        )
    if is_float and OVERSHOOT < high < DARKEST:
        raise ValueError(
            f"Frames of floats must lie in [0, 1] or in [0, 255], got {values.dtype} up to {high:g}, which may be "
            "either. Clip them to 1, or give integers."
        )
    if not is_float:
        return values[places].astype(np.uint8)
    return np.rint(values[places].clip(max=1) * 255.0 if high <= OVERSHOOT else values[places]).astype(np.uint8)
