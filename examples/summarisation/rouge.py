"""ROUGE of generated summaries, by the package rouge-score, with the tokeniser as part of the name.

A score depends on the tokeniser by one to two points, so two numbers compare only under one of them: the package's own
drops punctuation and splits at hyphens; what was published for How2 was scored on tokens split at blanks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer


KINDS = ("rouge1", "rouge2", "rougeL")


class BlankTokenizer:
    """Tokens as blanks divide them: case and punctuation count."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return text.split()


TOKENIZERS = {
    "blanks": lambda: RougeScorer(KINDS, tokenizer=BlankTokenizer()),
    "rouge-score": lambda: RougeScorer(KINDS),
    "rouge-score, stemmer": lambda: RougeScorer(KINDS, use_stemmer=True),
}


def rouge(predictions: Sequence[str], references: Sequence[str], tokenizer: str = "blanks") -> dict[str, float]:
    """F1 of each pair, averaged, in per cent.

    Args:
        predictions: one text each.
        references: one text each.
        tokenizer: `"blanks"`, as How2's published results are scored; `"rouge-score"`: the package's own;
            `"rouge-score, stemmer"`: that with Porter's stemmer.

    Returns:
        `rouge1 (blanks)`, `rouge2 (blanks)`, `rougeL (blanks)`, or with the tokeniser's name in its place.

    Raises:
        ValueError: if there are not as many references as predictions, none, or the tokeniser is unknown.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"`tokenizer` must be one of {', '.join(map(repr, TOKENIZERS))}, got {tokenizer!r}.")
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: there must be as many.")
    scorer = TOKENIZERS[tokenizer]()
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {
        f"{kind} ({tokenizer})": 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in KINDS
    }


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the predictions that equal their reference, in per cent; blanks at the ends don't count."""
    pairs = zip(predictions, references, strict=True)
    return 100 * float(np.mean([text.strip() == reference.strip() for text, reference in pairs]))
