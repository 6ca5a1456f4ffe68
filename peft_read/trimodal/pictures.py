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


def frames_of(video: Any, wanted: int, fps: float | None = None) -> Frames | None:
    """Sampled frames of a video, evenly over its time; all if there are no more.

    Args:
        video: a path, an URL, an open file, its bytes, or a dict with `path` or `bytes`; frames as an array or tensor
            `(frames, height, width, channels)` or `(frames, channels, height, width)`, grey, RGB or RGBA, integers up
            to 255 or floats in [0, 1] or in [0, 255]; a list of images, arrays or paths of images, or one image; a
            decoder or a batch of frames of torchcodec. None, or an empty dict, for none.
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
    images = [_image(video[place]) for place in places] if isinstance(video, list | tuple) else _array(video, places)
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


def _image(item: Any) -> NDArray[np.uint8]:
    """One picture, `(height, width, 3)`: an image of PIL, turned as its camera was held; a path; an array."""
    if is_source(item):
        from PIL import Image

        item = Image.open(item)
    if _is_image(item):
        from PIL import ImageOps

        return np.asarray(ImageOps.exif_transpose(item).convert("RGB"))
    array = np.asarray(item.cpu() if isinstance(item, Tensor) else item)
    if array.ndim not in (2, 3):
        raise ValueError(
            f"A frame must be (height, width), (height, width, channels) or (channels, height, width), got shape "
            f"{array.shape}."
        )
    if array.ndim == 2:
        array = array[..., None]
    return _array(item.new_tensor(array)[None] if isinstance(item, Tensor) else array[None], np.arange(1))[0]


def _array(video: Any, places: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Some frames of an array or tensor, `(height, width, 3)` each."""
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
    values = video.detach().float().cpu().numpy() if is_tensor and video.dtype.is_floating_point else np.asarray(video)
    values = _as_bytes(values, places)
    if first:
        values = np.moveaxis(values, 1, -1)
    values = values.repeat(3, -1) if values.shape[-1] == 1 else values[..., :3]
    return list(np.ascontiguousarray(values))


def _as_bytes(values: NDArray[Any], places: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The frames at some places in 0 to 255, whatever they are measured in."""
    if values.dtype == np.uint8:
        return values[places]
    if values.dtype == bool:
        return values[places].astype(np.uint8) * 255
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"Frames must be integers up to 255, or floats in [0, 1] or [0, 255], got {values.dtype} from {low:g} to "
            f"{high:g}. Give pictures as they were before normalisation: the image processor normalises them."
        )
    if values.dtype.kind == "f":
        values = np.rint(values[places] * (255.0 if high <= 1 else 1.0))
        return values.astype(np.uint8)
    return values[places].astype(np.uint8)
