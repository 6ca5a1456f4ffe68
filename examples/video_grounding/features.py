"""From annotations to what the model is trained on: the features of each video's frames, tokens and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase

from .annotations import Annotation, decode_clips


class FrameEncoder:
    """A frozen vision model of transformers as a function from frames to one feature vector each.

    Args:
        name: folder or hub id of the model and its image processor.
    """

    def __init__(self, name: str | Path) -> None:
        self.model = AutoModel.from_pretrained(name).eval()
        self.model = getattr(self.model, "vision_model", self.model)
        self.processor = _pil_image_processor(name)
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


def _pil_image_processor(name: str | Path) -> transformers.BaseImageProcessor:
    """The image processor that works on PIL images; `AutoImageProcessor` needs torchvision in older releases."""
    kind = transformers.BaseImageProcessor.get_image_processor_dict(name)[0]["image_processor_type"]
    pil_kind = kind.removesuffix("Pil").removesuffix("Fast") + "Pil"
    return getattr(transformers, pil_kind, getattr(transformers, kind)).from_pretrained(name)


def make_examples(
    annotations: Sequence[Annotation],
    encode: Callable[[np.ndarray], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    clip_seconds: float,
) -> list[dict[str, Any]]:
    """Decode and encode every video once, and pair it with its queries.

    Returns:
        One dict per annotation: `input_ids`, `frame_features (frames, size)` and `labels (frames,)`.
    """
    videos = dict.fromkeys(annotation.video for annotation in annotations)
    features = {
        video: encode(decode_clips(video, clip_seconds)) for video in tqdm(videos, desc="decode videos", leave=False)
    }
    return [
        {
            "input_ids": tokenizer(annotation.query)["input_ids"],
            "frame_features": features[annotation.video],
            "labels": torch.from_numpy(annotation.labels(len(features[annotation.video]), clip_seconds)),
        }
        for annotation in annotations
    ]


class Collator:
    """Pads examples into a batch.

    Args:
        pad_token_id: token that pads queries.
        noise: Gaussian noise on the frames' features, as augmentation: its standard deviation relative to theirs.
        examples: what that is relative to.
    """

    def __init__(self, pad_token_id: int, noise: float = 0.0, examples: Sequence[dict[str, Any]] = ()) -> None:
        self.pad_token_id = pad_token_id
        self.noise = noise * torch.cat([e["frame_features"] for e in examples]).std(0) if noise else torch.zeros(())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors `(batch, longest, ...)`; labels of padding are -100."""
        tokens = [torch.tensor(example["input_ids"]) for example in examples]
        frames = [example["frame_features"] for example in examples]
        features = pad_sequence(frames, batch_first=True)
        return {
            "input_ids": pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
            "frame_features": features + self.noise * torch.randn_like(features),
            "frame_mask": pad_sequence([torch.ones(len(f), dtype=torch.bool) for f in frames], batch_first=True),
            "labels": pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=-100.0),
        }
