"""Temporal grounding for the comparison: "the second five" in digit videos, with a base of its own for each seed.

Two panels that are never mixed: a base with positions, and one that sees frames as a set, whose position embeddings
are zero. Videos have 24 clips, of which the model sees every second one; the base is the first blocks of MiniLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.embedded import WORDS, digit_images, text_encoder_path
from common.files import finished, is_made
from common.training import train
from sklearn.metrics import average_precision_score
from torch import nn
from transformers import AutoTokenizer
from video_grounding.features import Collator, FrameEncoder, counting_only, tokenize
from video_grounding.modeling import GroundingModel
from video_grounding.ordered_digits import (
    Story,
    make_frame_encoder,
    make_story,
    render,
    story_with_three_of_a_kind,
    untuned_base,
)
from video_grounding.training import Examples, grounding_metrics


BLOCKS = 2
STRIDE = 2  # of the clips that are seen
SIZES = {"train": ("train", 400), "validation": ("train", 100), "test": ("test", 200)}
SOURCE_VIDEOS = 1000
FRAME_NOISE = 0.5
DRAWS = 20


class GroundingTask:
    """The task of a panel.

    Args:
        panel: `"positions"` or `"set"`.
        work: folder for what is made once.
    """

    metric, second_metric = "mAP", "hit@1"
    heads = ["saliency_head"]
    batch_size = 8

    def __init__(self, panel: str, work: Path) -> None:
        self.panel = panel
        self.work = work

    def make_videos(self, seed: int) -> Path:
        """Make videos and frame encoder of a seed, unless they exist; returns their folder."""
        videos = self._folder("videos", seed)
        if not is_made(videos):
            with finished(videos) as draft:
                _make_videos(draft, seed)
        return videos

    def make(self, seed: int) -> None:
        """Make videos, frame encoder and base of a seed, unless they exist."""
        videos, base = self.make_videos(seed), self._folder(self.panel, seed)
        if not is_made(base):
            with finished(base) as draft:
                self._make_base(draft, torch.load(videos / "source.pt", weights_only=False), seed)

    def examples(self, seed: int) -> dict[str, Examples]:
        """By split, the examples of a seed; of their queries the digit's name counts, for those who align words."""
        found: dict[str, Examples] = torch.load(self._folder("videos", seed) / "examples.pt", weights_only=False)
        tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
        return {split: [counting_only(each, WORDS, tokenizer) for each in some] for split, some in found.items()}

    def base(self, seed: int) -> GroundingModel:
        """The base of a seed, to be frozen."""
        return GroundingModel.from_pretrained(self._folder(self.panel, seed))

    def collator(self, noisy: Examples = ()) -> Collator:  # type: ignore[assignment]
        """Of batches; with noise relative to the features of `noisy`, if there are some."""
        tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
        return Collator(tokenizer, FRAME_NOISE if noisy else 0.0, noisy)

    @torch.no_grad()
    def score(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """Mean average precision (mAP) and hit@1, in per cent."""
        model.eval()
        collate, saliency = self.collator(), []
        for start in range(0, len(examples), 50):
            some = examples[start : start + 50]
            batch = collate(some)
            names = ("input_ids", "attention_mask", "frame_features", "frame_mask")
            logits = model(**{name: batch[name] for name in names}).logits.numpy()
            logits = np.nan_to_num(logits)  # of a rate at which training diverged
            saliency += [row[: len(each["labels"])] for row, each in zip(logits, some, strict=True)]
        return grounding_metrics(saliency, examples)

    def oracle(self, seed: int) -> float:
        """The score of who knows each frame's digit but not the order: the digit's events are ranked by chance."""
        rng = np.random.default_rng(seed)
        precisions = []
        for example in self.examples(seed)["test"]:
            for _ in range(DRAWS):
                scores = example["asked"] + 0.5 * rng.random(100)[example["events"]]
                precisions.append(average_precision_score(example["labels"].numpy(), scores))
        return 100 * float(np.mean(precisions))

    def _folder(self, what: str, seed: int) -> Path:
        return self.work / f"grounding-{what}-{seed}"

    def _make_base(self, folder: Path, source: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
        model = untuned_base(source["features"], source["classes"], tokenizer, num_hidden_layers=BLOCKS)
        embeddings = model.text_model.embeddings
        embeddings.word_embeddings.requires_grad_(False)
        if self.panel == "set":
            embeddings.position_embeddings.weight.data.zero_()
            embeddings.position_embeddings.requires_grad_(False)
        train(
            model,
            source["examples"],
            Collator(tokenizer, FRAME_NOISE, source["examples"]),
            steps=200,
            learning_rate=2e-4,
            learning_rates={"frame_projection": 1e-3, "saliency_head": 1e-3},
            seed=seed,
            output_dir=str(folder),
            description=f"tune base {seed}, {self.panel}",
        )
        model.save_pretrained(folder)


def _make_videos(folder: Path, seed: int) -> None:
    """Source videos with plain queries, and the task's, as features of a frame encoder of their own."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 9))
    images = digit_images()
    stories = [make_story(rng) for _ in range(SOURCE_VIDEOS)]
    frames = np.stack([render(rng, story, images["source"], 1)[::STRIDE] for story in stories])
    classes = np.stack([story.digit_of_clip[::STRIDE] for story in stories])
    make_frame_encoder(folder / "frame_encoder", frames.reshape(-1, *frames.shape[2:]), classes.ravel(), steps=300)
    encode = FrameEncoder(folder / "frame_encoder")
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
    features = torch.stack([encode(video) for video in frames])
    examples = []
    for story, video in zip(stories, features, strict=True):
        digit = int(rng.choice(story.digits))
        examples.append(_example(video, story, digit, f"the {WORDS[digit]}", tokenizer, second=False))
    source = {"features": features, "classes": torch.from_numpy(classes), "examples": examples}
    torch.save(source, folder / "source.pt")
    splits = {}
    for split, (pool, count) in SIZES.items():
        splits[split] = []
        for _ in range(count):
            story, digit = story_with_three_of_a_kind(rng)
            video = encode(render(rng, story, images[pool], 1)[::STRIDE])
            splits[split].append(_example(video, story, digit, f"the second {WORDS[digit]}", tokenizer, second=True))
    torch.save(splits, folder / "examples.pt")


def _example(
    features: torch.Tensor, story: Story, digit: int, query: str, tokenizer: Any, *, second: bool
) -> dict[str, Any]:
    """What is trained on, and for the oracle the event of each frame and whether it is of the digit."""
    events, classes = story.event_of_clip[::STRIDE], story.digit_of_clip[::STRIDE]
    asked = classes == digit
    wanted = [event for event, shown in enumerate(story.digits) if shown == digit]
    relevant = events == wanted[1] if second else asked
    return {
        **tokenize(tokenizer, query),
        "frame_features": features,
        "labels": torch.from_numpy(relevant).float(),
        "asked": asked.astype(float),
        "events": events,
    }
