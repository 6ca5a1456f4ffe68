"""From annotations to what the model is trained on: the features of each video's frames, tokens and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.annotations import iterate_clips
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase

from peft_read.trimodal.processing import pil_image_processor

from .annotations import Annotation, Caption


IGNORED = -100.0  # label of padding
FRAMES_AT_ONCE = 64  # of a video in memory


class FrameEncoder:
    """A frozen vision model of transformers as a function from frames to one feature vector each.

    Args:
        name: folder or hub id of the model and its image processor.
    """

    def __init__(self, name: str | Path) -> None:
        self.model = AutoModel.from_pretrained(name).eval()
        self.model = getattr(self.model, "vision_model", self.model)
        self.processor = pil_image_processor(name)
        if torch.cuda.is_available():
            self.model.to("cuda")

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, batch_size: int = 64) -> Tensor:
        """Features `(frames, size)` of frames `(frames, height, width, 3)`, uint8."""
        features = []
        for start in range(0, len(frames), batch_size):
            batch = self.processor(list(frames[start : start + batch_size]), return_tensors="pt").to(self.model.device)
            output = self.model(**batch)
            pooled = getattr(output, "pooler_output", None)
            features.append((output.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1).float().cpu())
        return torch.cat(features).clone()


def make_examples(
    annotations: Sequence[Annotation],
    encode: Callable[[np.ndarray], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    clip_seconds: float,
) -> list[dict[str, Any]]:
    """Decode and encode every video once, and pair it with its queries.

    Returns:
        One dict per annotation: what `tokenize` gives, `frame_features (frames, size)` and `labels (frames,)`.
    """
    features = _features_of_videos([annotation.video for annotation in annotations], encode, clip_seconds)
    return [
        {
            **tokenize(tokenizer, annotation.query),
            "frame_features": features[annotation.video],
            "labels": torch.from_numpy(annotation.labels(len(features[annotation.video]), clip_seconds)),
        }
        for annotation in annotations
    ]


def make_pair_examples(
    captions: Sequence[Caption],
    encode: Callable[[np.ndarray], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    clip_seconds: float,
) -> list[dict[str, Any]]:
    """The same of videos with captions, which have no labels."""
    features = _features_of_videos([pair.video for pair in captions], encode, clip_seconds)
    return [{**tokenize(tokenizer, pair.caption), "frame_features": features[pair.video]} for pair in captions]


def _features_of_videos(
    videos: Sequence[Path], encode: Callable[[np.ndarray], Tensor], clip_seconds: float
) -> dict[Path, Tensor]:
    features = {}
    for video in tqdm(dict.fromkeys(videos), desc="decode videos", leave=False):
        frames = iterate_clips(video, clip_seconds)
        parts = []
        while some := list(islice(frames, FRAMES_AT_ONCE)):
            parts.append(encode(np.stack(some)))
        features[video] = torch.cat(parts)
    return features


def tokenize(tokenizer: PreTrainedTokenizerBase, query: str) -> dict[str, list[int]]:
    """`input_ids` of a query, and `word_mask`: 1 for its words, 0 for special tokens."""
    encoded = tokenizer(query, return_special_tokens_mask=True)
    return {"input_ids": encoded["input_ids"], "word_mask": [1 - s for s in encoded["special_tokens_mask"]]}


def counting_only(example: dict[str, Any], words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An example of whose query only these words count, each a token of its own."""
    tokens = set(tokenizer.convert_tokens_to_ids(list(words)))
    pairs = zip(example["input_ids"], example["word_mask"], strict=True)
    return example | {"word_mask": [is_word * int(token in tokens) for token, is_word in pairs]}


class Collator:
    """Pads examples into a batch.

    Args:
        tokenizer: of the queries.
        noise: Gaussian noise on the frames' features, as augmentation: its standard deviation relative to theirs.
        examples: what that is relative to.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, noise: float = 0.0, examples: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.noise = noise * torch.cat([e["frame_features"] for e in examples]).std(0) if noise else torch.zeros(())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors `(batch, longest, ...)`; labels, where there are some, are `IGNORED` in padding.

        `video_token_mask` and `text_token_mask` say what is what in the sequence that `GroundingModel` makes of it.
        """
        tokens = [torch.tensor(example["input_ids"]) for example in examples]
        frames = [example["frame_features"] for example in examples]
        features = pad_sequence(frames, batch_first=True)
        words = pad_sequence([torch.tensor(example["word_mask"]) for example in examples], batch_first=True)
        length = words.shape[1] + features.shape[1] + (self.tokenizer.sep_token_id is not None)
        first = torch.tensor([[len(t)] for t in tokens])
        after = first + torch.tensor([[len(f)] for f in frames])
        positions = torch.arange(length)
        batch = {
            "input_ids": pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
            "frame_features": features + self.noise * torch.randn_like(features),
            "frame_mask": pad_sequence([torch.ones(len(f), dtype=torch.bool) for f in frames], batch_first=True),
            "video_token_mask": (positions >= first) & (positions < after),
            "text_token_mask": F.pad(words, (0, length - words.shape[1])).bool(),
        }
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return batch
