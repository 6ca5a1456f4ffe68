"""The ways to train that `benchmarks/pvla_pairs.py` compares, and in which order they are run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


RATE = 3e-3  # of READ and the head
STEPS = {"plain": 200, "second": 400}
POOL = 300  # labelled videos, of which a seed takes some
SEEDS, TUNING_SEEDS = range(200, 210), range(900, 902)
# PVLA's weight and the projection's rate: all that is tried on validation videos.
OPTIONS = ((3.0, 3e-3), (1.0, 3e-3), (10.0, 3e-3), (3.0, 1e-3), (3.0, 1e-2))
TUNED_ON = ("plain", 25)
PLANS_LOOKED_AT = 50  # test queries


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        pvla: options of PVLA beside the weight; None: without it.
        pairs: how many captioned videos are aligned; 0: the labelled videos with their own queries.
        others: whether each pair has the caption of another video.
        captions: `"natural"`, or `"digits"`: of captions and queries the words of digits alone are aligned.
        pooled: whether the means of frames and words are compared.
        stages: 1; 2: pairs first, on their own, then the labels, with the projection frozen; 0: pairs alone.
        ridge: whether the projection is the regression onto words by the labels of single frames, and frozen.
        like: the row of which it has weight and rate, or these themselves; None: they are chosen for it on validation.
        longer: how many times the steps of the others.
        seeds: how many of `SEEDS`.
    """

    pvla: dict[str, Any] | None = field(default_factory=dict)
    pairs: int = 0
    others: bool = False
    captions: str = "natural"
    pooled: bool = False
    stages: int = 1
    ridge: bool = False
    like: str | tuple[float, float] | None = None
    longer: int = 1
    seeds: int = 8


ALONE, CONTRASTIVE, PAPER = "READ alone", "contrastive .5, 400 pairs", "partial .5 (the paper's form), labelled videos"
DIGIT_WORDS = "partial .5, labelled videos, digit words only"
COSINE, INFO_NCE = "mean cosine, 400 pairs", "mean InfoNCE, 400 pairs"
NEGATIVES = {"pvla_negatives": True}
# What tells most, in this order.
ROWS: dict[str, Row] = {
    ALONE: Row(None, seeds=10),
    CONTRASTIVE: Row(NEGATIVES, 400),
    PAPER: Row(seeds=10),
    DIGIT_WORDS: Row(captions="digits", seeds=10),
    "contrastive .5, 400 pairs, captions of other videos": Row(NEGATIVES, 400, others=True, like=CONTRASTIVE),
    INFO_NCE: Row(NEGATIVES, 400, pooled=True),
    COSINE: Row(pairs=400, pooled=True),
    "full, labelled videos": Row({"pvla_mass": 1.0}),
    "ridge map on frame labels (upper bound)": Row(None, ridge=True, like=ALONE),
    "READ alone, three times the steps": Row(None, like=ALONE, longer=3, seeds=10),
    "partial .5 (the paper's form), labelled videos, options not chosen": Row(like=OPTIONS[0], seeds=10),
    "contrastive .5, 400 pairs, no labels: matching by cosine": Row(NEGATIVES, 400, stages=0, like=CONTRASTIVE),
    "contrastive .5, 400 pairs, two stages": Row(NEGATIVES, 400, stages=2, like=CONTRASTIVE),
    "contrastive .5, labelled videos": Row(NEGATIVES),
    "partial .5, 400 pairs": Row(pairs=400),
    "partial .5, 400 pairs, captions of other videos": Row(pairs=400, others=True, like="partial .5, 400 pairs"),
    "contrastive 1, 400 pairs": Row(NEGATIVES | {"pvla_mass": 1.0}, 400),
    "contrastive .5, 100 pairs": Row(NEGATIVES, 100, like=CONTRASTIVE),
    "contrastive .5, 400 pairs, digit words only": Row(NEGATIVES, 400, captions="digits", like=CONTRASTIVE),
    "partial .25, labelled videos": Row({"pvla_mass": 0.25}),
    "partial .75, labelled videos": Row({"pvla_mass": 0.75}),
    "mean cosine, labelled videos": Row(pooled=True),
    "mean InfoNCE, 400 pairs, captions of other videos": Row(NEGATIVES, 400, pooled=True, others=True, like=INFO_NCE),
    "mean cosine, 400 pairs, captions of other videos": Row(pairs=400, pooled=True, others=True, like=COSINE),
}
# Tasks and numbers of labels in the order of what tells most, and how many of the rows they have.
CELLS = {
    ("plain", 25): len(ROWS),
    ("second", 100): len(ROWS),
    ("plain", 50): 11,
    ("plain", 10): 11,
    ("plain", 100): 11,
    ("second", 50): 6,
    ("second", 25): 6,
    ("second", 10): 6,
}


@dataclass(frozen=True)
class Run:
    """What is run once.

    Attributes:
        task: `"plain"` or `"second"`.
        labels: number of labelled videos.
        row: the name of the way to train.
        seed: of everything.
        weight: of PVLA.
        rate: the projection's learning rate.
        steps: of training.
    """

    task: str
    labels: int
    row: str
    seed: int
    weight: float
    rate: float
    steps: int
