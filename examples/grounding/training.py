"""Batches of samples for the grounding model, and what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from .files import Sample


LABELS = ["saliency_labels", "span_labels"]
UNKNOWN = -1.0  # label of padding, and of what isn't known
MOST_SPANS = 5  # that Moment-DETR trains on, of a sentence


@dataclass
class Prediction:
    """What the model makes of one sample.

    Attributes:
        saliency: `(clips,)`, from 0 to 1.
        windows: `(slots, 3)`: start and end in seconds, and a score from 0 to 1; the best first. Empty without slots.
    """

    saliency: np.ndarray
    windows: np.ndarray


class MomentCollator:
    """Pads samples into a batch.

    Sequences are as `MomentModel` makes them, tokens before clips; `video_token_mask` and `text_token_mask` say which
    is which, for PVLA. Of more than five moments, five are drawn at random (torch's seed).
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Tensors `(batch, longest, ...)`; labels that no sample has are left out."""
        video, video_mask = _padded([np.asarray(sample.video) for sample in samples])
        batch = {"video_features": video, "video_mask": video_mask}
        words = video_mask.new_zeros(len(samples), 0)
        if samples[0].text is not None:
            batch["text_features"], words = _padded([sample.text for sample in samples if sample.text is not None])
            batch["text_mask"] = words
        batch["text_token_mask"] = torch.cat([words, torch.zeros_like(video_mask)], dim=1)
        batch["video_token_mask"] = torch.cat([torch.zeros_like(words), video_mask], dim=1)
        if any(sample.saliency is not None for sample in samples):
            rows = [_or_unknown(sample.saliency, sample.video.shape[:1]) for sample in samples]
            batch["saliency_labels"] = pad_sequence(rows, batch_first=True, padding_value=UNKNOWN)
        if any(sample.spans is not None for sample in samples):
            spans = [_some(_or_unknown(sample.spans, (0, 2))) for sample in samples]
            batch["span_labels"] = pad_sequence(spans, batch_first=True, padding_value=UNKNOWN)
        return batch


def predict(trainer: Trainer, samples: Sequence[Sample]) -> list[Prediction]:
    """What a trainer's model makes of samples."""
    unlabelled = [replace(sample, spans=None, saliency=None) for sample in samples]
    output = trainer.predict(unlabelled).predictions  # type: ignore[arg-type]
    saliency, *moments = output if isinstance(output, tuple) else (output,)
    predictions = []
    for row, sample in enumerate(samples):
        logits = saliency[row, : len(sample.video)]
        windows = np.zeros((0, 3), dtype=np.float32)
        if moments:
            spans, scores = moments[0][row], moments[1][row]
            ends = np.stack([spans[:, 0] - spans[:, 1] / 2, spans[:, 0] + spans[:, 1] / 2], axis=1)
            windows = np.concatenate([ends.clip(0, 1) * sample.seconds, scores[:, None]], axis=1)
            windows = windows[np.argsort(-scores, kind="stable")]
        predictions.append(Prediction(1 / (1 + np.exp(-logits.astype(np.float64))), windows))
    return predictions


def _padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """`(batch, longest, size)`, and which of it is valid."""
    tensors = [torch.from_numpy(each) for each in rows]
    valid = [torch.ones(len(each), dtype=torch.bool) for each in tensors]
    return pad_sequence(tensors, batch_first=True), pad_sequence(valid, batch_first=True)


def _or_unknown(labels: np.ndarray | None, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, UNKNOWN) if labels is None else torch.from_numpy(labels).float()


def _some(spans: Tensor) -> Tensor:
    return spans if len(spans) <= MOST_SPANS else spans[torch.randperm(len(spans))[:MOST_SPANS]]
