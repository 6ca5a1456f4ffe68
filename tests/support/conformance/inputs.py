"""Random inputs of every kind: rows of one sample each, and how they become a padded batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .shrink import FRAMES, IMAGE, PATCH


# Two samples that differ in length wherever length is free.
LENGTHS = (9, 5)
SAMPLES = (4000, 2800)
PLACEHOLDER, START, PAD = 150, 151, 0
MELS = 16
Row = dict[str, Tensor]


def text(generator: torch.Generator, length: int) -> Row:
    ids = torch.randint(3, 100, (1, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def for_decoder(generator: torch.Generator, length: int) -> Row:
    return {f"decoder_{name}": value for name, value in text(generator, length).items()}


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, 3, IMAGE, IMAGE, generator=generator)


def _text2text(generator: torch.Generator, i: int) -> Row:
    return text(generator, LENGTHS[i]) | for_decoder(generator, LENGTHS[1 - i])


def _waveform(generator: torch.Generator, i: int) -> Row:
    values = torch.randn(1, SAMPLES[i], generator=generator)
    return {"input_values": values, "attention_mask": torch.ones_like(values, dtype=torch.long)}


def _speech(time: int, bands_first: bool = False) -> Callable[[torch.Generator, int], Row]:
    """Sound of one length, and texts of two."""

    def row(generator: torch.Generator, i: int) -> Row:
        sound = torch.randn(1, time, MELS, generator=generator)
        return {"input_features": sound.mT if bands_first else sound} | for_decoder(generator, LENGTHS[i])

    return row


def _with(placeholders: int, name: str, make: Callable[[torch.Generator], Row], kind: int = 0) -> Callable[..., Row]:
    """Text in which placeholders stand for what `make` gives; `name` of the argument that tells kinds of token."""

    def row(generator: torch.Generator, i: int) -> Row:
        given = text(generator, 2 + placeholders + LENGTHS[i])
        given["input_ids"][:, 1] = START
        given["input_ids"][:, 2 : 2 + placeholders] = PLACEHOLDER
        if name:
            given[name] = torch.where(given["input_ids"] == PLACEHOLDER, kind, 0)
        return given | make(generator)

    return row


def _image(generator: torch.Generator) -> Row:
    return {"pixel_values": pixels(generator, 1)}


def _video(generator: torch.Generator) -> Row:
    return {"pixel_values_videos": pixels(generator, 1, FRAMES)}


def _packed_video(generator: torch.Generator) -> Row:
    """Two pairs of frames, 4x4 patches each, as Qwen's processors give them."""
    patches = torch.randn(2 * 16, 3 * 2 * PATCH * PATCH, generator=generator)
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[2, 4, 4]])}


# By kind: sample `i` of a family, as a batch of one.
INPUTS: dict[str, Callable[[torch.Generator, int], Row]] = {
    "text": lambda g, i: text(g, LENGTHS[i]),
    "text2text": _text2text,
    "image": lambda g, i: {"pixel_values": pixels(g, 1)},
    "video": lambda g, i: {"pixel_values": pixels(g, 1, FRAMES)},
    "dual": lambda g, i: text(g, LENGTHS[i]) | {"pixel_values": pixels(g, 1)},
    "dual_video": lambda g, i: text(g, LENGTHS[i]) | {"pixel_values": pixels(g, 1, FRAMES)},
    "waveform": _waveform,
    "spectrogram": lambda g, i: {"input_values": torch.randn(1, 48, MELS, generator=g)},
    "mel_speech": _speech(128, bands_first=True),
    "speech": _speech(40),
    "image_text": _with(4, "", _image),
    "typed_image_text": _with(4, "token_type_ids", _image, kind=1),
    "images_text": _with(4, "", lambda g: {"pixel_values": pixels(g, 1, 1)}),
    "video_text": _with(FRAMES, "", _video),
    "long_video_text": _with(FRAMES * 5, "", _video),
    "timed_video_text": _with(8, "", lambda g: _packed_video(g) | {"video_second_per_grid": torch.ones(1)}),
    "packed_video_text": _with(8, "mm_token_type_ids", _packed_video, kind=2),
}
# Padded; everything else has one size for all samples.
OF_LENGTH = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "input_values"}


def samples(kind: str, *, of_one_length: bool = False) -> list[Row]:
    """Two batches of one sample each, always the same ones; of two lengths, where length is free."""
    generator = torch.Generator().manual_seed(1)
    return [INPUTS[kind](generator, 0 if of_one_length else i) for i in range(2)]


def collate(rows: list[Row], side: str = "right") -> Row:
    """One batch of several, padded on a side; what is padded holds zeros."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.removeprefix("decoder_") in OF_LENGTH:
            longest = max(value.shape[1] for value in values)
            values = [_pad(value, longest - value.shape[1], side) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _pad(value: Tensor, missing: int, side: str) -> Tensor:
    padding = value.new_full((len(value), missing, *value.shape[2:]), PAD)
    return torch.cat([padding, value] if side == "left" else [value, padding], dim=1)


def with_positions(batch: Row) -> Row:
    """The batch with the position of every token in its own sample."""
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
