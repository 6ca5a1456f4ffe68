"""Data with video and text for tiny models, sample by sample."""

import torch
from alignment_models import VIDEO, VISUAL
from models import IMAGE, PATCH, VOCAB, WIDTH


SAMPLES = 8


TIME = 10


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(*ranges, time=TIME):
    """1 in the ranges, 0 elsewhere."""
    mask = torch.zeros(time, dtype=torch.long)
    for start, stop in ranges:
        mask[start:stop] = 1
    return mask


def words(row, length=TIME):
    return torch.randint(3, VIDEO, (length,), generator=torch.Generator().manual_seed(100 + row))


def marked(rows=SAMPLES, embedded=True, videos=True):
    """Classification of a question followed by a video and padding, of several lengths; in the third row no video."""
    data = []
    for row in range(rows):
        frames = 0 if row == 2 and videos == "some" else 2 + row % 4
        example = {
            "attention_mask": places((0, 3 + row % 2 + frames)),
            "labels": torch.tensor(row % 3),
            "video_token_mask": places((3 + row % 2, 3 + row % 2 + frames)),
            # The words that count; the padding is marked as well, and must not.
            "text_token_mask": places((1, 3 + row % 2), (TIME - 1, TIME)),
        }
        example |= {"inputs_embeds": random(TIME, WIDTH, seed=row)} if embedded else {"input_ids": words(row)}
        data.append(example)
    return data


def spoken(rows=SAMPLES):
    """For a causal language model: video, text and padding; another number of labels in each row."""
    data = []
    for row, example in enumerate(marked(rows, embedded=False, videos="some")):
        said = example["attention_mask"] * (1 - example["video_token_mask"]) * places((row // 3, TIME))
        data.append(example | {"labels": torch.where(said == 1, example["input_ids"], -100)})
    return data


def generated(rows=SAMPLES):
    """The same for an encoder-decoder that says something about it."""
    return [example | {"labels": words(row, 5)} for row, example in enumerate(marked(rows))]


def pictured(rows=SAMPLES):
    """Of LLaVA: an image's placeholders, then text, padded on the right."""
    data = []
    for row in range(rows):
        ids, valid = words(row), places((0, 8 + row % 3))
        ids[1:5] = VISUAL
        data.append(
            {
                "input_ids": ids,
                "attention_mask": valid,
                "pixel_values": random(3, IMAGE, IMAGE, seed=row),
                "labels": torch.where((valid == 1) & (ids != VISUAL), ids, -100),
            }
        )
    return data


def told(rows=SAMPLES):
    """As `pictured`, without a picture."""
    data = pictured(rows)
    for example in data:
        ids = example["input_ids"].clone()
        ids[1:5] = torch.tensor([5, 6, 7, 8])
        example |= {"input_ids": ids, "labels": ids, "pixel_values": None}
    return data


def some_pictured(examples):
    """A batch of which some samples, or none, have a picture."""
    names = [name for name in examples[0] if name != "pixel_values"]
    batch = {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in names}
    pictures = [example["pixel_values"] for example in examples if example["pixel_values"] is not None]
    return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})


def filmed(rows=SAMPLES):
    """Of Qwen2-VL: a video's placeholders, then text."""
    data = []
    for row in range(rows):
        ids = words(row)
        ids[1:3] = VIDEO
        data.append(
            {
                "input_ids": ids,
                "attention_mask": places((0, TIME)),
                "pixel_values_videos": random(8, 3 * 2 * PATCH**2, seed=row),
                "video_grid_thw": torch.tensor([2, 2, 2]),
                "mm_token_type_ids": 2 * (ids == VIDEO).long(),
                "labels": torch.where(ids == VIDEO, -100, ids),
            }
        )
    return data


def joined(examples):
    """A batch of Qwen2-VL, which takes the patches of all videos in a row."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return batch | {"pixel_values_videos": batch["pixel_values_videos"].flatten(0, 1)}


def captioned(frames=None, rows=SAMPLES):
    """Of dual encoders: captions of several lengths, images or videos."""
    shape = (3, IMAGE, IMAGE) if frames is None else (frames, 3, IMAGE, IMAGE)
    data = []
    for row in range(rows):
        ids, length = words(row, 6), 3 + row % 4
        ids[length - 1] = VOCAB - 1  # where the text ends, and where CLIP reads it
        data.append(
            {
                "input_ids": ids,
                "attention_mask": places((0, length), time=6),
                "pixel_values": random(*shape, seed=row),
                "return_loss": True,
            }
        )
    return data


def stacked(examples):
    """A batch of a dual encoder, which is told by a single argument to return its loss."""
    names = [name for name in examples[0] if name != "return_loss"]
    batch = {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in names}
    return batch | {"return_loss": True}


def images_in_a_row(examples):
    """A batch of CLIP with several images for each text."""
    batch = stacked(examples)
    return batch | {"pixel_values": batch["pixel_values"].flatten(0, 1), "return_loss": False}
