"""Batches of videos with summaries, and the summaries that a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .how2 import SummarySample


IGNORED = -100
MOST_SOURCE, MOST_TARGET = 511, 63  # tokens, as VG-BART cuts them, each with one to spare
GENERATION: dict[str, Any] = {"num_beams": 5, "max_length": 64, "no_repeat_ngram_size": 3, "early_stopping": True}


class SummaryCollator:
    """Tokenises and pads samples into a batch.

    A transcript has no special tokens and at most 511 others; a summary ends with the tokeniser's end token, after at
    most 63 others. `video_token_mask` and `text_token_mask` say what is what in `SummaryModel`'s sequence.

    Args:
        tokenizer: of transcripts and summaries.
        noise: Gaussian noise on the frames' features, as augmentation: its standard deviation relative to theirs.
        samples: what that is relative to.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, noise: float = 0.0, samples: Sequence[SummarySample] = ()
    ) -> None:
        self.tokenizer = tokenizer
        rows = [torch.from_numpy(np.asarray(sample.video)) for sample in samples] if noise else []
        self.noise = noise * torch.cat(rows).std(0) if rows else torch.zeros(())

    def __call__(self, samples: Sequence[SummarySample]) -> dict[str, Tensor]:
        """Tensors `(batch, longest, ...)`; without a transcript in any sample, `input_ids` are left out."""
        frames = [torch.from_numpy(np.asarray(sample.video)) for sample in samples]
        features = pad_sequence(frames, batch_first=True)
        frame_mask = _mask([len(each) for each in frames])
        batch = {"frame_features": features + self.noise * torch.randn_like(features), "frame_mask": frame_mask}
        batch["labels"] = pad_sequence(
            [self._target(sample.summary) for sample in samples], batch_first=True, padding_value=IGNORED
        )
        counts = [0] * len(samples)
        if any(sample.transcript for sample in samples):
            words = [self._tokens(sample.transcript)[:MOST_SOURCE] for sample in samples]
            counts = [len(each) for each in words]
            padding = self.tokenizer.pad_token_id
            batch["input_ids"] = pad_sequence(words, batch_first=True, padding_value=padding or 0)
            batch["attention_mask"] = _mask(counts).long()
        length = max(counts) + features.shape[1]
        positions, first = torch.arange(length), torch.tensor(counts)[:, None]
        batch["text_token_mask"] = positions < first
        batch["video_token_mask"] = (positions >= first) & (positions < first + frame_mask.sum(1, keepdim=True))
        return batch

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def _target(self, text: str) -> Tensor:
        return torch.cat([self._tokens(text)[:MOST_TARGET], torch.tensor([self.tokenizer.eos_token_id])])


@torch.no_grad()
def summarise(
    model: nn.Module,
    samples: Sequence[SummarySample],
    collator: SummaryCollator,
    *,
    batch_size: int = 16,
    options: dict[str, Any] = GENERATION,
) -> list[str]:
    """The summaries that a model writes.

    Args:
        model: a `SummaryModel`, adapted or not.
        samples: their summaries aren't looked at.
        collator: without noise.
        batch_size: samples at once.
        options: of transformers' `generate`; by default VG-BART's.
    """
    model.eval()
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    texts: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = collator(samples[start : start + batch_size])
        names = ("frame_features", "frame_mask", "input_ids", "attention_mask")
        tokens = inner.generate(**{name: batch[name].to(device) for name in names if name in batch}, **options)
        texts += collator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _mask(lengths: Sequence[int]) -> Tensor:
    """`(batch, longest)`, bool."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
