"""From video files, sound and text to what a trimodal model takes."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BatchFeature,
)
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import PushToHubMixin

from . import media
from .configuration import TrimodalConfig


LOADERS: dict[str, Any] = {
    "image": AutoImageProcessor,
    "video": AutoVideoProcessor,
    "audio": AutoFeatureExtractor,
    "text": AutoTokenizer,
}
# Spectrograms of extractors that don't say what they do: Kaldi's windows, in seconds.
WINDOW, HOP = 0.025, 0.010


class TrimodalProcessor(PushToHubMixin):
    """Makes a batch for a [`TrimodalModel`] out of media, with the processors that its towers were pretrained with.

    A sample may have no video, no sound or no text: None in the list. It is masked out then, and what all samples lack
    isn't in the batch.

    Args:
        vision: an image processor, with or without torchvision, or a video processor; None for none.
        audio: a feature extractor; None for none.
        text: a tokenizer; None for none.
        num_frames: frames to take of a video, evenly over its length; all if it has fewer.
        frame_padding: `"longest"`: fill up to the batch's longest video; `"max_length"`: to `num_frames`, as video
            towers need that take a fixed number.

    Raises:
        ValueError: if there are fewer than two processors, or an option isn't one of those.
    """

    def __init__(
        self,
        vision: Any = None,
        audio: Any = None,
        text: Any = None,
        num_frames: int = 8,
        frame_padding: Literal["longest", "max_length"] = "longest",
    ) -> None:
        if sum(part is not None for part in (vision, audio, text)) < 2:
            raise ValueError("A TrimodalProcessor needs at least two of `vision`, `audio` and `text`.")
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        if frame_padding not in ("longest", "max_length"):
            raise ValueError(f"`frame_padding` must be 'longest' or 'max_length', got {frame_padding!r}.")
        self.vision = vision
        self.audio = audio
        self.text = text
        self.num_frames = num_frames
        self.frame_padding = frame_padding

    @classmethod
    def from_pretrained_towers(
        cls, vision: str | None = None, audio: str | None = None, text: str | None = None, **options: Any
    ) -> Self:
        """Take the processors that belong to towers.

        Args:
            vision: id of a model on the Hub, or path of a folder; its image processor, or else its video processor.
            audio: the same for sound.
            text: the same for text.
            options: `num_frames` and `frame_padding`.
        """
        parts: dict[str, Any] = {}
        if vision is not None:
            try:
                parts["vision"] = AutoImageProcessor.from_pretrained(vision)
            except ImportError:  # transformers before 5.23 without torchvision
                parts["vision"] = pil_image_processor(vision)
            except (OSError, ValueError):
                parts["vision"] = AutoVideoProcessor.from_pretrained(vision)
        for name, source in (("audio", audio), ("text", text)):
            if source is not None:
                parts[name] = LOADERS[name].from_pretrained(source)
        return cls(**parts, **options)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a batch may hold."""
        names = ["pixel_values", "frame_mask"] if self.vision is not None else []
        if self.audio is not None:
            names += [self.audio.model_input_names[0], "audio_mask"]
        return names + (["input_ids", "attention_mask"] if self.text is not None else [])

    def __call__(
        self,
        videos: Sequence[Any] | None = None,
        audio: Sequence[Any] | Literal["videos"] | None = None,
        text: Sequence[str | None] | None = None,
        sampling_rate: int | None = None,
        **text_options: Any,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            videos: of each sample a path; frames `(frames, height, width, 3)` or, as a tensor,
                `(frames, 3, height, width)`, of integers up to 255; or a list of images.
            audio: of each sample a path, or a waveform `(samples,)`; or `"videos"`, the sound tracks of the videos,
                which have to be paths then.
            text: of each sample a string.
            sampling_rate: samples a second of waveforms.
            text_options: passed to the tokenizer, such as `max_length`; by default it truncates, and pads to the
                longest.

        Returns:
            `pixel_values (batch, frames, channels, height, width)` and `frame_mask (batch, frames)`; `input_values` or
            `input_features` and `audio_mask`; `input_ids` and `attention_mask (batch, words)`. Masks are 1 where real.

        Raises:
            ImportError: if there are files to read, and PyAV isn't installed.
            ValueError: if lists have different lengths, there is no processor for something, or a waveform comes
                without its sampling rate.
        """
        if isinstance(audio, str):
            if audio != "videos":
                raise ValueError(f"`audio` must be a list, or 'videos' for the videos' own sound, got {audio!r}.")
            if videos is None or not all(video is None or _is_path(video) for video in videos):
                raise ValueError("`audio='videos'` needs `videos` that are paths: other videos have no sound.")
            audio = videos
        given = {"vision": videos, "audio": audio, "text": text}
        lengths = {}
        for name, samples in given.items():
            if samples is None:
                continue
            if isinstance(samples, str | os.PathLike):
                raise ValueError(f"Give a list, with an item for each sample, for {name}, not {samples!r} alone.")
            if getattr(self, name) is None:
                raise ValueError(f"This processor has no part for {name}: make it with `{name}=...`.")
            lengths[name] = len(samples)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Give videos, audio or text, of the same number of samples; got {lengths or 'nothing'}.")
        batch: dict[str, Tensor] = {}
        if videos is not None and any(video is not None for video in videos):
            batch |= self._pictures([self._frames(video) for video in videos])
        if audio is not None:
            sounds = [self._sound(sound, sampling_rate) for sound in audio]
            batch |= self._sounds(sounds) if any(sound is not None for sound in sounds) else {}
        if text is not None and any(words is not None for words in text):
            batch |= self._words(text, text_options)
        return BatchFeature(batch)

    def _frames(self, video: Any) -> list[Any] | None:
        """A video's sampled frames, as images `(height, width, 3)`."""
        if video is None:
            return None
        if _is_path(video):
            return list(media.read_frames(video, self.num_frames))
        if isinstance(video, Tensor):
            video = video.movedim(-3, -1).cpu().numpy()
        frames = [video[place] for place in media.even_places(len(video), self.num_frames)]
        if not frames:
            raise ValueError("A video has no frames; give None for a sample without video.")
        return frames

    def _pictures(self, videos: list[list[Any] | None]) -> dict[str, Tensor]:
        """Processed frames, filled up with zeros."""
        processed = [None if frames is None else self._processed(frames) for frames in videos]
        longest = max(len(frames) for frames in processed if frames is not None)
        steps = self.num_frames if self.frame_padding == "max_length" else longest
        shape = next(frames.shape[1:] for frames in processed if frames is not None)
        pixels = torch.zeros(len(videos), steps, *shape)
        mask = torch.zeros(len(videos), steps, dtype=torch.long)
        for row, frames in enumerate(processed):
            if frames is not None:
                pixels[row, : len(frames)] = frames
                mask[row, : len(frames)] = 1
        return {"pixel_values": pixels, "frame_mask": mask}

    def _processed(self, frames: list[Any]) -> Tensor:
        """`(frames, channels, height, width)`."""
        if self._takes_videos():
            arrays = np.stack([np.asarray(frame) for frame in frames])
            options = {"do_sample_frames": False} if self._is_video_processor() else {}
            video = torch.from_numpy(arrays).movedim(-1, -3) if options else list(arrays)
            output = self.vision([video], return_tensors="pt", **options)
            return next(iter(output.values()))[0]
        pixels: Tensor = self.vision(frames, return_tensors="pt")["pixel_values"]
        return pixels

    def _takes_videos(self) -> bool:
        return "videos" in inspect.signature(self.vision.preprocess).parameters

    def _is_video_processor(self) -> bool:
        return hasattr(self.vision, "do_sample_frames")

    def _sound(self, sound: Any, rate: int | None) -> NDArray[np.float32] | None:
        """A waveform at the extractor's rate."""
        if sound is None:
            return None
        wanted = self.audio.sampling_rate
        if _is_path(sound):
            return media.read_sound(sound, wanted)
        if rate is None:
            raise ValueError("Give the `sampling_rate` of the waveforms in `audio`.")
        samples = np.asarray(sound)
        if samples.ndim != 1:
            raise ValueError(f"A waveform must be (samples,), of one channel, got shape {samples.shape}.")
        return media.resample(samples, rate, wanted)

    def _sounds(self, sounds: list[NDArray[np.float32] | None]) -> dict[str, Tensor]:
        """Features of all sounds, filled up by the extractor, and which of them are real."""
        rate = self.audio.sampling_rate
        silence = np.zeros(rate // 10, np.float32)
        filled = [silence if sound is None else sound for sound in sounds]
        known = inspect.signature(self.audio.__call__).parameters
        asked = {"return_attention_mask": True} if "return_attention_mask" in known else {}
        if "padding" in known and known["padding"].default is False:
            asked["padding"] = True
        output = self.audio(filled, sampling_rate=rate, return_tensors="pt", **asked)
        name = self.audio.model_input_names[0]
        features: Tensor = output[name]
        mask = output.get("attention_mask")
        if mask is None:
            mask = self._mask_by_length(features, [len(sound) for sound in filled])
        there = torch.tensor([sound is not None for sound in sounds])
        return {name: features, "audio_mask": (mask.bool() & there[:, None]).long()}

    def _mask_by_length(self, features: Tensor, samples: list[int]) -> Tensor:
        """`(batch, time)`: the frames of a spectrogram that lie in the sound, of extractors that give no mask."""
        if features.ndim == 4:  # CLAP repeats a short sound
            return torch.ones(len(features), features.shape[-2])
        rate = self.audio.sampling_rate
        lengths = torch.tensor([(count - WINDOW * rate) // (HOP * rate) + 1 for count in samples])
        return torch.arange(features.shape[1]) < lengths[:, None].clamp(min=1)

    def _words(self, text: Sequence[str | None], options: dict[str, Any]) -> dict[str, Tensor]:
        """Token ids, and which of them are real."""
        asked = {"padding": True, "truncation": True} | options
        written = [words if words is not None else "" for words in text]
        output = self.text(written, return_tensors="pt", return_attention_mask=True, **asked)
        there = torch.tensor([words is not None for words in text])
        mask = output["attention_mask"] * there[:, None]
        return {"input_ids": output["input_ids"], "attention_mask": mask}

    def save_pretrained(self, save_directory: media.Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save each processor in a folder of its own, and the options.

        Args:
            save_directory: where to; made if it isn't there.
            push_to_hub: whether to upload the folder as well.
            kwargs: passed to `push_to_hub`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {}
        for name in ("vision", "audio", "text"):
            if (part := getattr(self, name)) is not None:
                kind = name if name != "vision" else "video" if self._is_video_processor() else "image"
                kinds[name] = {"kind": kind, "class": type(part).__name__}
                part.save_pretrained(folder / name)
        options = {"num_frames": self.num_frames, "frame_padding": self.frame_padding}
        content = {"processor_class": type(self).__name__, "parts": kinds} | options
        (folder / PROCESSOR_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: media.Path, **kwargs: Any) -> Self:
        """Load what `save_pretrained` saved.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a model on the Hub.
            kwargs: options to change, `num_frames` or `frame_padding`.

        Raises:
            OSError: if there is no such processor.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = [PROCESSOR_NAME, "vision/*", "audio/*", "text/*"]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns))
        if not (folder / PROCESSOR_NAME).is_file():
            raise OSError(f"There is no trimodal processor in {pretrained_model_name_or_path}: no {PROCESSOR_NAME}.")
        content = json.loads((folder / PROCESSOR_NAME).read_text(encoding="utf-8"))
        parts = {name: _load(folder / name, part["kind"], part["class"]) for name, part in content["parts"].items()}
        options = {name: kwargs.get(name, content[name]) for name in ("num_frames", "frame_padding")}
        return cls(**parts, **options)


def pil_image_processor(name: str | Path) -> Any:
    """The image processor of a model, in the form that needs no torchvision.

    Args:
        name: id of the model on the Hub, or path of a folder.
    """
    kind = transformers.BaseImageProcessor.get_image_processor_dict(name)[0]["image_processor_type"]
    pil_kind = kind.removesuffix("Pil").removesuffix("Fast") + "Pil"
    return getattr(transformers, pil_kind, getattr(transformers, kind)).from_pretrained(name)


def _load(folder: Path, kind: str, name: str) -> Any:
    try:
        return LOADERS[kind].from_pretrained(folder)
    except ImportError:  # older versions of transformers choose between classes only if they have torchvision
        return getattr(transformers, name).from_pretrained(folder)


def _is_path(item: Any) -> bool:
    return isinstance(item, str | os.PathLike)


AutoProcessor.register(TrimodalConfig, TrimodalProcessor, exist_ok=True)
