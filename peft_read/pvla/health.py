"""Figures that tell whether the alignment of video and language learns something."""

from __future__ import annotations

import torch
from torch import Tensor

from .loss import PvlaDetails, PvlaLoss
from .source import VideoTextStates


@torch.no_grad()
def alignment_health(
    loss: PvlaLoss, states: VideoTextStates, details: PvlaDetails, mismatched: VideoTextStates | None
) -> dict[str, Tensor]:
    """Means over the valid samples of a batch.

    Args:
        loss: the loss that gave the details.
        states: what was aligned.
        details: what the loss found.
        mismatched: videos beside words of other samples, in the same order; None if there are no such states.

    Returns:
        `frames`, `words`: how many of each a sample has. `residual`: how far from optimal the plans are, above 0.01
        the solver needs more iterations. `pairs`: effective number of matched pairs, the exponential of the plan's
        entropy. `gap`: how much farther a mismatched video and sentence are than a sample's own, which grows where the
        alignment learns something (missing without such).
    """
    valid, count = details.valid, details.valid.sum().clamp(min=1)
    pairs = torch.special.entr(details.plan).sum((1, 2)).exp()
    health = {"residual": details.residual.sum() / count, "pairs": (pairs * valid).sum() / count}
    sides = {"frames": (states.video, states.frame_mask), "words": (states.words, states.word_mask)}
    for name, (side, mask) in sides.items():
        counts = valid * side.shape[1] if mask is None else valid * (mask > 0).sum(1)
        health[name] = counts.sum() / count
    if mismatched is not None:
        distances = loss.without_negatives().details(*mismatched[:4])
        both = valid & distances.valid
        if both.any():
            health["gap"] = ((distances.distance - details.distance) * both).sum() / both.sum()
    return health
