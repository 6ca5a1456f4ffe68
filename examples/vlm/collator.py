"""Samples into batches, by the chat template and the processor of any video language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from .data import Message, Sample
from .frames import Video, decode_frames
from .placeholders import check_placeholders


IGNORED = -100


@dataclass
class VlmCollator:
    """Makes batches: of questions with answers to learn, or of questions alone, padded on the left, to answer.

    Nothing is ever cut off. What is learnt is the answer and whatever the template puts behind it; `text_token_mask`
    says which tokens are the words of question and answer.

    Attributes:
        processor: the model's own.
        fps: as in `decode_frames`, and `max_frames` and `max_pixels`.
        template_options: keyword arguments of the chat template.
    """

    processor: ProcessorMixin
    fps: float = 2.0
    max_frames: int = 32
    max_pixels: int | None = None
    template_options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of samples, all with an answer to learn or all without."""
        videos = [self.video(sample) for sample in samples]
        learns = samples[0].answer is not None
        prompts, wholes = zip(*(self._texts(s, v) for s, v in zip(samples, videos, strict=True)), strict=True)
        batch = self._process(wholes if learns else prompts, videos, "right" if learns else "left")
        check_placeholders(self.processor, batch, [len(frames) for frames, _ in videos])
        if learns:
            ids, valid = batch["input_ids"], batch["attention_mask"].bool()
            batch["labels"] = torch.full_like(ids, IGNORED)
            batch["text_token_mask"] = torch.zeros_like(ids)
            for row, (sample, prompt, whole) in enumerate(zip(samples, prompts, wholes, strict=True)):
                places = valid[row].nonzero()[:, 0]
                answer, words = self._answer_and_words(sample, prompt, whole, ids[row, places])
                batch["labels"][row, places[answer]] = ids[row, places[answer]]
                batch["text_token_mask"][row, places[words]] = 1
        return batch

    def video(self, sample: Sample) -> Video:
        """The frames of a sample's video."""
        return decode_frames(sample.video, self.fps, self.max_frames, self.max_pixels)

    @property
    def takes_videos(self) -> bool:
        """Whether the processor does; else a video is given as images."""
        return getattr(self.processor, "video_processor", None) is not None

    def _texts(self, sample: Sample, video: Video) -> tuple[str, str]:
        """The conversation up to the answer, and with it."""
        messages = sample.messages if self.takes_videos else as_images(sample.messages, video)
        prompt = self._render(messages, add_generation_prompt=True)
        if sample.answer is None:
            return prompt, prompt
        said = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        return prompt, self._render([*messages, said])

    def _render(self, messages: list[Message], **options: Any) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, **options, **self.template_options)

    def _process(self, texts: Sequence[str], videos: list[Video], side: str) -> dict[str, Tensor]:
        if self.takes_videos:
            given = {
                "videos": [[frames] for frames, _ in videos],
                "video_metadata": [metadata for _, metadata in videos],
                "do_sample_frames": False,  # they are sampled, and have their times
            }
        else:
            given = {"images": [list(frames) for frames, _ in videos]}
        options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        try:
            return dict(self.processor(text=list(texts), **given, **options))
        except (ValueError, RuntimeError, TypeError) as error:
            lengths = [len(frames) for frames, _ in videos]
            if len(set(lengths)) == 1:
                raise
            raise ValueError(
                f"{type(self.processor).__name__} can't batch videos of {lengths} frames ({error}). Give all videos "
                f"as many frames, such as --fps 100 --max_frames {min(lengths)}, or batches of one."
            ) from error

    def _answer_and_words(self, sample: Sample, prompt: str, whole: str, row: Tensor) -> tuple[slice, list[int]]:
        """Which of a row's valid tokens are the answer, and which are words of question or answer."""
        before, said = (self._tokenize(text) for text in (prompt, whole))
        count = len(said) - len(before)
        if said[: len(before)] != before or count <= 0 or row[-count:].tolist() != said[-count:]:
            raise ValueError(
                f"{sample.line}: the conversation with its answer doesn't begin as the one without, so that the "
                f"answer's tokens can't be told. Without:\n{prompt}\nWith:\n{whole}\nThe chat template may take "
                "options that mend this, such as --template_options '{\"enable_thinking\": false}'."
            )
        answer = slice(len(row) - count, len(row))
        assert sample.answer is not None
        spoken = find_tokens(row.tolist(), self._tokens_of(whole, sample.answer), answer.start)
        asked = find_tokens(row[: answer.start].tolist(), self._tokens_of(prompt, sample.question))
        return answer, [*asked, *spoken]

    def _tokenize(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _tokens_of(self, text: str, part: str) -> list[int]:
        """The tokens that lie within the last occurrence of a part of a text."""
        start = text.rfind(part.strip())
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [
            start - 1 <= low and high <= start + len(part.strip()) and low < high and high > start
            for low, high in encoded["offset_mapping"]
        ]
        return [token for token, within in zip(encoded["input_ids"], inside, strict=True) if within and start >= 0]


def as_images(messages: list[Message], video: Video) -> list[Message]:
    """A conversation with each frame as an image, after its time, in the place of the video."""
    _, metadata = video
    frames: list[dict[str, Any]] = []
    for index in metadata.frames_indices:
        frames += [{"type": "text", "text": f"{index / metadata.fps:.1f} s: "}, {"type": "image"}]
    told = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [part for item in content for part in (frames if item.get("type") == "video" else [item])]
        told.append({**message, "content": content})
    return told


def find_tokens(row: list[int], tokens: list[int], start: int = 0) -> range:
    """Where a run of tokens lies in a row, the last time from `start` on; nowhere if it is empty or isn't there."""
    for first in range(len(row) - len(tokens), start - 1, -1):
        if tokens and row[first : first + len(tokens)] == tokens:
            return range(first, first + len(tokens))
    return range(0)
