"""Summaries for the comparison: ordered captions of digit videos, with a base of its own for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common.embedded import WORDS
from summarisation.how2 import SummarySample
from summarisation.modeling import SummaryModel
from summarisation.ordered_captions import (
    FRAME_NOISE,
    GREEDY,
    caption_tokenizer,
    make_caption_base,
    ordered_caption,
)
from summarisation.rouge import exact_match, rouge
from summarisation.training import SummaryCollator, summarise
from torch import nn

from .grounding import GroundingTask


SIZES = {"train": ("train", 400), "validation": ("train", 100), "test": ("test", 200)}
DRAWS = 5


class SummaryTask:
    """The task.

    Args:
        work: folder for what is made once.
    """

    panel = "summaries"
    metric, second_metric = "rougeL (blanks)", "exact match"
    heads = ["text_model.lm_head"]
    batch_size = 8

    def __init__(self, work: Path) -> None:
        self.work = work

    def make(self, seed: int) -> None:
        """Make videos, frame encoder and base of a seed, unless they exist."""
        encoder = GroundingTask("positions", self.work).make_videos(seed) / "frame_encoder"
        make_caption_base(self._folder(seed), seed, SIZES, frame_encoder=encoder)

    def examples(self, seed: int) -> dict[str, list[SummarySample]]:
        """By split, the samples of a seed."""
        found: dict[str, list[SummarySample]] = torch.load(self._folder(seed) / "samples.pt", weights_only=False)
        return found

    def base(self, seed: int) -> SummaryModel:
        """The base of a seed, to be frozen."""
        return SummaryModel.from_pretrained(self._folder(seed) / "model")

    def collator(self, noisy: Sequence[SummarySample] = ()) -> SummaryCollator:
        """Of batches; with noise relative to the features of `noisy`, if there are some."""
        return SummaryCollator(caption_tokenizer(), FRAME_NOISE if noisy else 0.0, noisy)

    def score(self, model: nn.Module, examples: Sequence[SummarySample]) -> dict[str, float]:
        """ROUGE and exact match of greedy summaries, in per cent."""
        texts = summarise(model, examples, self.collator(), batch_size=50, options=GREEDY)
        references = [example.summary for example in examples]
        return rouge(texts, references) | {"exact match": exact_match(texts, references)}

    def oracle(self, seed: int) -> float:
        """The score of who knows which digits are shown but not in which order: an order by chance."""
        rng = np.random.default_rng(seed)
        texts, references = [], []
        for example in self.examples(seed)["test"]:
            digits = [WORDS.index(word) for word in example.summary.split() if word in WORDS]
            texts += [ordered_caption([int(d) for d in rng.permutation(digits)]) for _ in range(DRAWS)]
            references += [example.summary] * DRAWS
        return rouge(texts, references)[self.metric]

    def _folder(self, seed: int) -> Path:
        return self.work / f"{self.panel}-{seed}"
