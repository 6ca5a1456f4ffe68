"""From annotations to what the models are trained on: clips as the towers take them, and the answer of each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from peft_read import TrimodalProcessor

from .annotations import Annotation, length_of


Example = dict[str, Any]
MASKS = {
    "pixel_values": "frame_mask",
    "input_values": "audio_mask",
    "input_features": "audio_mask",
    "input_ids": "attention_mask",
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
        `input_ids`, with the masks that go with them, and `labels (frames,)`, the index of the answer, one more than
        the last where there is none.

    Raises:
        ValueError: if a clip can't be decoded.
    """
    clips: dict[Any, tuple[Example, float]] = {}
    for video in tqdm(dict.fromkeys(each.video for each in annotations), desc="decode clips", leave=False):
        seconds = length_of(video)
        clips[video] = _first(processor(videos=[str(video)], audio="videos")), seconds
    examples = []
    for each in annotations:
        clip, seconds = clips[each.video]
        labels = [
            len(answers) if answer is None else answers.index(answer)
            for answer in each.of_frames(len(clip["pixel_values"]), seconds)
        ]
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
        for name, mask in MASKS.items():
            some = next((example for example in examples if name in example), None)
            if some is None or MODALITIES[name] not in self.modalities:
                continue
            batch[name] = _pad([example.get(name, torch.zeros_like(some[name][:1])) for example in examples])
            batch[mask] = _pad([example.get(mask, torch.zeros_like(some[mask][:1])) for example in examples])
        return batch | {"labels": _pad([example["labels"] for example in examples], -100)}


def _pad(values: list[Tensor], padding: int = 0) -> Tensor:
    return pad_sequence(values, batch_first=True, padding_value=padding)


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
