"""From annotations to what the models are trained on: clips as the towers take them, and the answer of each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from peft_read import TrimodalProcessor

from .annotations import Annotation


Example = dict[str, Any]
# By input, its mask and its times.
BESIDE = {
    "pixel_values": ("frame_mask", "frame_times"),
    "input_values": ("audio_mask", "audio_times"),
    "input_features": ("audio_mask", "audio_times"),
    "input_ids": ("attention_mask",),
}
MODALITIES = {"pixel_values": "vision", "input_values": "audio", "input_features": "audio", "input_ids": "text"}


def make_examples(
    annotations: Sequence[Annotation], processor: TrimodalProcessor, answers: Sequence[str]
) -> list[Example]:
    """Decode every clip once, and pair it with its questions.

    Args:
        annotations: clips with questions.
        processor: makes inputs of pictures, sound and text.
        answers: what can be answered.

    Returns:
        One dict per annotation, without a batch dimension: `pixel_values`, `input_values` or `input_features` and
        `input_ids`, with the masks and times that go with them, and `labels (frames,)`, the index of the answer in the
        middle of a frame's time, one more than the last where there is none.

    Raises:
        ValueError: if a clip can't be decoded.
    """
    videos = tqdm(dict.fromkeys(each.video for each in annotations), desc="decode clips", leave=False)
    clips: dict[Any, Example] = {video: _first(processor(videos=[str(video)], audio="videos")) for video in videos}
    examples = []
    for each in annotations:
        clip = clips[each.video]
        found = each.at(clip["frame_times"].mean(-1).tolist())
        labels = [len(answers) if answer is None else answers.index(answer) for answer in found]
        examples.append(clip | _first(processor(text=[each.query])) | {"labels": torch.tensor(labels)})
    return examples


def _first(batch: dict[str, Tensor]) -> Example:
    return {name: values[0] for name, values in batch.items()}


class Collator:
    """Pads examples into a batch.

    Args:
        modalities: `"vision"`, `"audio"` and `"text"`, those to keep.
    """

    def __init__(self, modalities: Sequence[str] = ("vision", "audio", "text")) -> None:
        self.modalities = modalities

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """Tensors `(batch, longest, ...)`, and masks; where an example lacks a modality, its mask is 0.

        Labels of padding are -100.
        """
        batch = {}
        for name, beside in BESIDE.items():
            some = next((example for example in examples if name in example), None)
            if some is None or MODALITIES[name] not in self.modalities:
                continue
            for each in (name, *beside):
                batch[each] = _pad([example.get(each, torch.zeros_like(some[each][:1])) for example in examples])
        return batch | {"labels": _pad([example["labels"] for example in examples], -100)}


def _pad(values: list[Tensor], padding: int = 0) -> Tensor:
    """A batch of tensors of any sizes; sound in one segment beside sound in several has an axis of them, too."""
    most = max(value.ndim for value in values)
    values = [value if value.ndim == most else value[None] for value in values]
    sizes = [max(each) for each in zip(*(value.shape for value in values), strict=True)]
    batch = values[0].new_full((len(values), *sizes), padding)
    for row, value in zip(batch, values, strict=True):
        row[tuple(map(slice, value.shape))] = value
    return batch


def without_pictures(examples: Sequence[Example]) -> list[Example]:
    """The same examples, with blank frames."""
    return [example | {"pixel_values": torch.zeros_like(example["pixel_values"])} for example in examples]


def with_shuffled_sound(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same examples, in each of which the sound of the frames is in another order."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for example in examples:
        name = next(name for name in ("input_values", "input_features") if name in example)
        parts = example[name].tensor_split(len(example["labels"]))
        order = torch.randperm(len(parts), generator=generator).tolist()
        shuffled.append(example | {name: torch.cat([parts[place] for place in order])})
    return shuffled
