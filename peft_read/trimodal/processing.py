"""From video files, sound and text to what a trimodal model takes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

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

from .configuration import TrimodalConfig
from .media import Frames, Sound, is_source
from .media import Path as AnyPath
from .options import frame_count, frame_rate, of_each, sample_rate
from .pictures import frames_of
from .sounds import features_of, segment_length, sound_of


T = TypeVar("T")
LOADERS: dict[str, Any] = {
    "image": AutoImageProcessor,
    "video": AutoVideoProcessor,
    "audio": AutoFeatureExtractor,
    "text": AutoTokenizer,
}
OPTIONS = ("num_frames", "frame_padding", "segment_seconds")


class TrimodalProcessor(PushToHubMixin):
    """Makes a batch for a [`TrimodalModel`] out of media, with the processors that its towers were pretrained with.

    A sample may have no video, no sound or no text: None in the list. It is masked out then, and what all samples lack
    isn't in the batch. Pictures and sound are on one clock, that of their file, so that the model lets those meet that
    happen at the same second.

    Args:
        vision: an image processor, with or without torchvision, or a video processor; None for none.
        audio: a feature extractor; None for none.
        text: a tokenizer; None for none.
        num_frames: frames to take of a video, evenly over its time; all if it has no more.
        frame_padding: `"longest"`: fill up to the batch's longest video; `"max_length"`: to `num_frames`, as video
            towers need that take a fixed number.
        segment_seconds: sound is cut into segments of this length, which the audio tower hears one by one; by default
            as long as it hears at once (10.24 s for an AST, 30 s for Whisper, 10 s for CLAP), and 30 s for towers that
            could hear for longer.

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
        segment_seconds: float | None = None,
    ) -> None:
        if sum(part is not None for part in (vision, audio, text)) < 2:
            raise ValueError("A TrimodalProcessor needs at least two of `vision`, `audio` and `text`.")
        num_frames = frame_count(num_frames)
        if frame_padding not in ("longest", "max_length"):
            raise ValueError(f"`frame_padding` must be 'longest' or 'max_length', got {frame_padding!r}.")
        if audio is not None:
            segment_length(audio, segment_seconds)
        self.vision = vision
        self.audio = audio
        self.text = text
        self.num_frames = num_frames
        self.frame_padding = frame_padding
        self.segment_seconds = segment_seconds

    @classmethod
    def from_pretrained_towers(
        cls, vision: str | None = None, audio: str | None = None, text: str | None = None, **options: Any
    ) -> Self:
        """Take the processors that belong to towers.

        Args:
            vision: id of a model on the Hub, or path of a folder; its image processor, or else its video processor.
            audio: the same for sound.
            text: the same for text.
            options: `num_frames`, `frame_padding` and `segment_seconds`.
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
        names = ["pixel_values", "frame_mask", "frame_times"] if self.vision is not None else []
        if self.audio is not None:
            names += [self.audio.model_input_names[0], "audio_mask", "audio_times"]
        return names + (["input_ids", "attention_mask"] if self.text is not None else [])

    def __call__(
        self,
        videos: Sequence[Any] | None = None,
        audio: Sequence[Any] | Literal["videos"] | None = None,
        text: Sequence[str | None] | None = None,
        sampling_rate: int | Sequence[int | None] | None = None,
        fps: float | Sequence[float | None] | None = None,
        num_frames: int | None = None,
        return_tensors: str = "pt",
        **text_options: Any,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            videos: of each sample a path, an URL, an open file, bytes, or a dict with `path` or `bytes`; frames as an
                array or tensor `(frames, height, width, channels)` or `(frames, channels, height, width)`, of integers
                up to 255 or floats in [0, 1] or [0, 255]; a list of images or of their paths; a decoder of torchcodec.
            audio: of each sample a file as above; a waveform `(samples,)`, `(channels, samples)` or `(samples,
                channels)`, of floats in [-1, 1] or integers of 8 to 32 bits, alone, in a pair with its rate, or in a
                dict as `array` with its `sampling_rate`; a decoder of torchcodec. Or `"videos"`, the sound tracks of
                the videos, which have to be files then.
            text: of each sample a string.
            sampling_rate: samples a second of waveforms that come without, of all or of each.
            fps: frames a second of frames that come without times, of all or of each. Where it isn't known, frames are
                taken to lie evenly over their sample's sound.
            num_frames: in place of the processor's own.
            return_tensors: `"pt"`, or `"np"` for NumPy.
            text_options: passed to the tokenizer, such as `max_length`; by default it truncates, and pads to the
                longest.

        Returns:
            `pixel_values (batch, frames, channels, height, width)`, `frame_mask (batch, frames)` and `frame_times
            (batch, frames, 2)`, from when to when each frame counts; `input_values` or `input_features`, `audio_mask
            (batch, steps)` and `audio_times (batch, 2)`, when the first step begins and how long a step lasts, all
            three with an axis of segments after the batch if a sound is longer than a segment; `input_ids` and
            `attention_mask (batch, words)`. Masks are 1 where real, times are in seconds.

        Raises:
            ImportError: if there are files to read, and PyAV isn't installed.
            FileNotFoundError: if there is no such file.
            TypeError: if an option isn't known, or something is no video, sound or text.
            ValueError: if lists have different lengths, a rate or number isn't one, there is no processor for
                something, or a sample can't be read; the message says which.
        """
        if str(getattr(return_tensors, "value", return_tensors)) not in ("pt", "np"):
            raise ValueError(f"`return_tensors` must be 'pt' or 'np', got {return_tensors!r}.")
        self._check_options(text_options)
        count = frame_count(self.num_frames if num_frames is None else num_frames)
        if isinstance(audio, str):
            if audio != "videos":
                raise ValueError(f"`audio` must be a list, or 'videos' for the videos' own sound, got {audio!r}.")
            if videos is None or not all(map(_may_have_sound, videos)):
                raise ValueError(
                    "`audio='videos'` needs `videos` that are paths, bytes or open files: other videos have no sound."
                )
            audio = videos
        size = self._check_samples({"vision": videos, "audio": audio, "text": text})
        rates = of_each(sampling_rate, size, "sampling_rate", sample_rate)
        speeds = of_each(fps, size, "fps", frame_rate)
        batch: dict[str, Tensor] = {}
        sounds: list[Sound | None] = [None] * size
        if audio is not None:
            wanted = self.audio.sampling_rate
            sounds = _of_samples("audio", audio, lambda row, each: sound_of(each, rates[row], wanted))
        if videos is not None:
            frames = _of_samples("videos", videos, lambda row, each: frames_of(each, count, speeds[row]))
            if any(each is not None for each in frames):
                batch |= self._pictures(frames, sounds, count)
        if any(sound is not None for sound in sounds):
            batch |= features_of(self.audio, sounds, segment_length(self.audio, self.segment_seconds))
        if text is not None and any(words is not None for words in text):
            batch |= self._words(text, text_options)
        if return_tensors == "np":
            return BatchFeature({name: value.numpy() for name, value in batch.items()})
        return BatchFeature(batch)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse what nobody would look at."""
        if "images" in options:
            raise TypeError("Give pictures as `videos`, a list of images for each sample: there is no `images`.")
        known = inspect.signature(self.text.__call__).parameters if self.text is not None else {}
        for name in options:
            if name not in known:
                raise TypeError(
                    f"`{name}` is no option of a TrimodalProcessor"
                    + (f", nor of its {type(self.text).__name__}." if self.text is not None else ".")
                )

    def _check_samples(self, given: dict[str, Sequence[Any] | None]) -> int:
        """The number of samples."""
        lengths = {}
        for name, samples in given.items():
            if samples is None:
                continue
            if isinstance(samples, bytes) or is_source(samples):
                raise ValueError(f"Give a list, with an item for each sample, for {name}, not {samples!r} alone.")
            if getattr(self, name) is None:
                raise ValueError(f"This processor has no part for {name}: make it with `{name}=...`.")
            lengths[name] = len(samples)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Give videos, audio or text, of the same number of samples; got {lengths or 'nothing'}.")
        return next(iter(lengths.values()))

    def _pictures(
        self, videos: Sequence[Frames | None], sounds: Sequence[Sound | None], count: int
    ) -> dict[str, Tensor]:
        """Processed frames, filled up with zeros, and when they are shown."""
        processed = [None if video is None else self._processed(video.images) for video in videos]
        longest = max(len(frames) for frames in processed if frames is not None)
        steps = count if self.frame_padding == "max_length" else longest
        shape = next(frames.shape[1:] for frames in processed if frames is not None)
        pixels = torch.zeros(len(videos), steps, *shape)
        mask = torch.zeros(len(videos), steps, dtype=torch.long)
        times = torch.zeros(len(videos), steps, 2)
        for row, (video, frames) in enumerate(zip(videos, processed, strict=True)):
            if video is not None and frames is not None:
                pixels[row, : len(frames)] = frames
                mask[row, : len(frames)] = 1
                times[row, : len(frames)] = torch.from_numpy(self._times(video, sounds[row])).float()
        return {"pixel_values": pixels, "frame_mask": mask, "frame_times": times}

    def _times(self, video: Frames, sound: Sound | None) -> NDArray[np.float64]:
        """From when to when each frame counts; where that isn't known, evenly over the sound, else a second each."""
        if video.times is not None:
            return video.times
        count = len(video.images)
        begin, length = 0.0, float(count)
        if sound is not None:
            begin, length = sound.start, len(sound.samples) / self.audio.sampling_rate
        borders = begin + length * np.arange(count + 1) / count
        return np.stack([borders[:-1], borders[1:]], -1)

    def _processed(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """`(frames, channels, height, width)`."""
        if self._is_video_processor():
            video = torch.from_numpy(np.stack(images)).movedim(-1, -3)
            output = self.vision([video], return_tensors="pt", do_sample_frames=False)
            return next(iter(output.values()))[0]
        from PIL import Image  # which every image processor of transformers needs

        frames = [Image.fromarray(image) for image in images]  # which tells height, width and channels apart
        if "videos" in inspect.signature(self.vision.preprocess).parameters:
            return next(iter(self.vision([frames], return_tensors="pt").values()))[0]
        pixels: Tensor = self.vision(frames, return_tensors="pt")["pixel_values"]
        return pixels

    def _is_video_processor(self) -> bool:
        return hasattr(self.vision, "do_sample_frames")

    def _words(self, text: Sequence[str | None], options: dict[str, Any]) -> dict[str, Tensor]:
        """Token ids, and which of them are real."""
        asked = {"padding": True, "truncation": True} | options
        if asked["padding"] and self.text.pad_token is None:
            raise ValueError(
                "This processor's tokenizer has no pad token to fill up shorter texts with: set "
                "`processor.text.pad_token = processor.text.eos_token`; masks keep it from counting."
            )
        written = [words if words is not None else "" for words in text]
        output = self.text(written, return_tensors="pt", return_attention_mask=True, **asked)
        there = torch.tensor([words is not None for words in text])
        mask = output["attention_mask"] * there[:, None]
        return {"input_ids": output["input_ids"], "attention_mask": mask}

    def save_pretrained(self, save_directory: AnyPath, push_to_hub: bool = False, **kwargs: Any) -> None:
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
        options = {name: getattr(self, name) for name in OPTIONS}
        content = {"processor_class": type(self).__name__, "parts": kinds} | options
        (folder / PROCESSOR_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: AnyPath, **kwargs: Any) -> Self:
        """Load what `save_pretrained` saved.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a model on the Hub.
            kwargs: options to change, `num_frames`, `frame_padding` or `segment_seconds`.

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
        options = {name: kwargs.get(name, content.get(name)) for name in OPTIONS}
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


def _may_have_sound(video: Any) -> bool:
    return video is None or isinstance(video, bytes | bytearray | dict) or is_source(video)


def _of_samples(name: str, samples: Sequence[Any], read: Callable[[int, Any], T]) -> list[T]:
    """What is read of each sample; what goes wrong says of which."""
    values = []
    for row, sample in enumerate(samples):
        try:
            values.append(read(row, sample))
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise type(error)(f"{name}[{row}]: {error}") from error
    return values


AutoProcessor.register(TrimodalConfig, TrimodalProcessor, exist_ok=True)
