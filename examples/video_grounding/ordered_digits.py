"""The embedded default: videos of moving handwritten digits, and a base that knows digits but not their order.

Handwritten digits of scikit-learn move through noisy videos, between distractors. The images that the base has seen,
those that the adapter is trained on and those that it is tested on are disjoint. The base is tuned on plain queries
("the five": all its moments); the task asks for "the second five", for which order matters and a ramp in time is no
help.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from common.annotations import ANNOTATIONS
from common.embedded import WORDS, Digits, digit_images, text_encoder_path
from common.files import finished, is_made
from common.training import train
from sklearn.linear_model import Ridge
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, ResNetConfig, ResNetModel, ViTImageProcessorPil

from .features import Collator, FrameEncoder, tokenize
from .modeling import GroundingConfig, GroundingModel


NUM_CLIPS = 24
CLIP_SECONDS = 1.0
FRAMES_PER_CLIP = 4
CANVAS = 16  # pixels a side, in which an 8 x 8 digit moves
ZOOM = 2
NOTHING = len(WORDS)  # class of a frame without a digit
BLOCKS = 3  # of the text encoder's six, in the tuned base: enough for the task, in half the time


@dataclass(frozen=True)
class Story:
    """What happens in a video: `digits`, in the order of their events, and the event of each clip, -1 between them."""

    digits: list[int]
    event_of_clip: np.ndarray

    @property
    def digit_of_clip(self) -> np.ndarray:
        """`(clips,)`, the digit that is seen, `NOTHING` between events."""
        return np.array([NOTHING if event < 0 else self.digits[event] for event in self.event_of_clip])


def make_story(rng: np.random.Generator) -> Story:
    """Five to seven events of two or three clips, of three or four different digits, none twice in a row."""
    choice = rng.choice(10, size=rng.integers(3, 5), replace=False)
    digits = [int(rng.choice(choice))]
    for _ in range(rng.integers(4, 7)):
        digits.append(int(rng.choice([digit for digit in choice if digit != digits[-1]])))
    lengths = rng.integers(2, 4, size=len(digits))
    gaps = rng.multinomial(NUM_CLIPS - lengths.sum(), np.full(len(digits) + 1, 1 / (len(digits) + 1)))
    events: list[int] = [-1] * gaps[0]
    for event, (length, gap) in enumerate(zip(lengths, gaps[1:], strict=True)):
        events += [event] * length + [-1] * gap
    return Story(digits, np.array(events))


def render(rng: np.random.Generator, story: Story, images: Digits, frames_per_clip: int) -> np.ndarray:
    """Frames `(clips * frames_per_clip, height, width, 3)`, uint8. Digits drift; distractors are scrambled digits."""
    frames = np.zeros((NUM_CLIPS * frames_per_clip, CANVAS, CANVAS), dtype=np.float32)
    shown, image, place, speed = -1, np.zeros((8, 8)), np.zeros(2), np.zeros(2)
    for index, canvas in enumerate(frames):
        event = int(story.event_of_clip[index // frames_per_clip])
        if event < 0 and index % frames_per_clip == 0:
            pool = images[int(rng.integers(10))]
            image = rng.permutation(pool[rng.integers(len(pool))].ravel()).reshape(8, 8)
            place, speed = rng.integers(0, CANVAS - 7, size=2).astype(float), np.zeros(2)
        elif event >= 0 and event != shown:
            pool = images[story.digits[event]]
            image = pool[rng.integers(len(pool))]
            place = rng.integers(0, CANVAS - 7, size=2).astype(float)
            speed = rng.uniform(-1.5, 1.5, size=2) / frames_per_clip
        shown = event
        row, column = np.clip(np.round(place), 0, CANVAS - 8).astype(int)
        canvas[row : row + 8, column : column + 8] = image * rng.uniform(0.7, 1)
        place = place + speed
    frames = np.clip(frames + 0.15 * rng.random(frames.shape, dtype=np.float32), 0, 1)
    pixels = (255 * frames).astype(np.uint8).repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
    return np.repeat(pixels[..., None], 3, axis=-1)


def make_dataset(folder: Path, plain: bool = False, training_videos: int = 100, seed: int = 0) -> None:
    """Write training videos, 100 validation and 200 test videos as mp4, with annotations, unless they exist.

    The queries ask for the second of a digit's events; plain ones, about the same videos, for all of them.
    """
    if is_made(folder):
        return
    images = digit_images()
    lines = []
    with finished(folder) as draft:
        (draft / "videos").mkdir()
        for part, (split, pool, count) in enumerate(
            (("train", "train", training_videos), ("validation", "train", 100), ("test", "test", 200))
        ):
            rng = np.random.default_rng((seed, part))
            for number in tqdm(range(count), desc=f"make {split} videos", leave=False):
                story, digit = story_with_three_of_a_kind(rng)
                name = f"videos/{split}_{number:03d}.mp4"
                _write_video(draft / name, render(rng, story, images[pool], FRAMES_PER_CLIP))
                events = [event for event, d in enumerate(story.digits) if d == digit]
                windows = []
                for event in events if plain else events[1:2]:
                    clips = np.flatnonzero(story.event_of_clip == event)
                    windows.append([float(clips[0] * CLIP_SECONDS), float((clips[-1] + 1) * CLIP_SECONDS)])
                query = f"the {WORDS[digit]}" if plain else f"the second {WORDS[digit]}"
                lines.append({"video": name, "query": query, "relevant_windows": windows, "split": split})
        (draft / ANNOTATIONS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_pairs(folder: Path, videos: int = 400, seed: int = 0) -> None:
    """Write videos with a caption each and no labels, unless they exist: which digits they show, in any order."""
    if is_made(folder):
        return
    images, rng = digit_images()["train"], np.random.default_rng((seed, 4))
    lines = []
    with finished(folder) as draft:
        (draft / "videos").mkdir()
        for number in tqdm(range(videos), desc="make captioned videos", leave=False):
            story = make_story(rng)
            name = f"videos/{number:03d}.mp4"
            _write_video(draft / name, render(rng, story, images, FRAMES_PER_CLIP))
            shown = [f"a {WORDS[digit]}" for digit in rng.permutation(sorted(set(story.digits)))]
            lines.append({"video": name, "caption": f"{', '.join(shown[:-1])} and {shown[-1]}"})
        (draft / ANNOTATIONS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def story_with_three_of_a_kind(rng: np.random.Generator) -> tuple[Story, int]:
    """A story and a digit that is in it at least three times."""
    while True:
        story = make_story(rng)
        often = [digit for digit in sorted(set(story.digits)) if story.digits.count(digit) >= 3]
        if often:
            return story, int(rng.choice(often))


def _write_video(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(FRAMES_PER_CLIP / CLIP_SECONDS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_base(folder: Path, seed: int = 0) -> None:
    """Make the frame encoder and two base models once, and save them below `folder`, unless they exist.

    `untuned` is the text encoder as it comes, with a projection of the frames. `model`, its first blocks, is tuned on
    plain queries, no longer than it takes to answer them: the better a base is at frames of one digit being alike, the
    longer an adapter takes to tell them apart, and that time differs from base to base.
    """
    if is_made(folder):
        return
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 3))
    images = digit_images()["source"]
    stories = [make_story(rng) for _ in range(1500)]
    frames = np.stack([render(rng, story, images, frames_per_clip=1) for story in stories])
    classes = np.stack([story.digit_of_clip for story in stories])
    with finished(folder) as draft:
        make_frame_encoder(draft / "frame_encoder", frames.reshape(-1, *frames.shape[2:]), classes.ravel())
        encode = FrameEncoder(draft / "frame_encoder")
        features = torch.stack([encode(video) for video in tqdm(frames, desc="encode source clips", leave=False)])
        tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
        untuned_base(features, torch.from_numpy(classes), tokenizer).save_pretrained(draft / "untuned")
        tokenizer.save_pretrained(draft / "untuned")
        model = untuned_base(features, torch.from_numpy(classes), tokenizer, num_hidden_layers=BLOCKS)
        model.get_input_embeddings().requires_grad_(False)
        examples = []
        for story, video in zip(stories, features, strict=True):
            digit = int(rng.choice(story.digits))
            labels = torch.from_numpy(story.digit_of_clip == digit).float()
            query = tokenize(tokenizer, f"the {WORDS[digit]}")
            examples.append({**query, "frame_features": video, "labels": labels})
        train(
            model,
            examples,
            Collator(tokenizer, 0.5, examples),
            steps=200,
            learning_rate=2e-4,
            learning_rates={"frame_projection": 1e-3, "saliency_head": 1e-3},
            seed=seed,
            description="tune base",
        )
        model.save_pretrained(draft / "model")
        tokenizer.save_pretrained(draft / "model")


def make_frame_encoder(folder: Path, frames: np.ndarray, classes: np.ndarray, steps: int = 400) -> None:
    """Train a small ResNet to tell the digits, and save it with its image processor.

    Args:
        folder: to save to.
        frames: `(frames, height, width, 3)`, uint8.
        classes: `(frames,)`, the digit of each, or `NOTHING`.
        steps: of 128 frames.
    """
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    model, head = ResNetModel(config), nn.Linear(64, NOTHING + 1)
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    targets = torch.from_numpy(classes)
    for _ in tqdm(range(steps), desc="train frame encoder", leave=False):
        chosen = torch.randint(len(frames), (128,))
        pixels = processor(list(frames[chosen.numpy()]), return_tensors="pt")["pixel_values"]
        loss = F.cross_entropy(head(model(pixels).pooler_output.flatten(1)), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def untuned_base(
    features: torch.Tensor, classes: torch.Tensor, tokenizer: AutoTokenizer, **fields: Any
) -> GroundingModel:
    """The text encoder, with frames projected to the word embedding of the digit that they show (ridge regression).

    Args:
        features: `(..., size)`, of frames.
        classes: `(...)`, their digit, or `NOTHING`.
        tokenizer: of the text encoder.
        fields: of its configuration that differ.
    """
    text_model = AutoModel.from_pretrained(
        text_encoder_path(),
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **fields,
    )
    words = tokenizer.convert_tokens_to_ids([*WORDS, "nothing"])
    embeddings = text_model.get_input_embeddings().weight.detach()[words]
    ridge = Ridge(alpha=10.0).fit(features.flatten(0, -2).numpy(), embeddings[classes.flatten()].numpy())
    config = GroundingConfig(text_model.config, features.shape[-1], tokenizer.sep_token_id)
    model = GroundingModel(config, text_model)
    with torch.no_grad():
        model.frame_projection.weight.copy_(torch.from_numpy(ridge.coef_))
        model.frame_projection.bias.copy_(torch.from_numpy(ridge.intercept_))
    return model
