"""Figures that tell whether the alignment of video and language learns something, and what it does to the task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .loss import PvlaDetails, PvlaLoss
from .states import VideoTextStates


@torch.no_grad()
def alignment_health(
    loss: PvlaLoss, states: VideoTextStates, details: PvlaDetails, blocks: int = 1
) -> dict[str, Tensor]:
    """Means over the valid samples of a batch.

    Args:
        loss: the loss that gave the details.
        states: what it was given.
        details: what it found.
        blocks: how many blocks' states lie side by side in the batch.

    Returns:
        `residual`: how far from optimal the plans are, above 0.01 the solver needs more iterations; `pairs`: effective
        number of matched pairs, the exponential of the plan's entropy; `gap`: how much farther the words of another
        sample are than a sample's own, which grows where the alignment learns something (of batches of one, missing).
    """
    valid, count = details.valid, details.valid.sum().clamp(min=1)
    pairs = torch.special.entr(details.plan).sum((1, 2)).exp()
    health = {"residual": details.residual.sum() / count, "pairs": (pairs * valid).sum() / count}
    if len(valid) > blocks:
        words, mask = (None if x is None else _of_another_sample(x, blocks) for x in (states.words, states.word_mask))
        assert words is not None
        other = loss.details(states.video, words, states.frame_mask, mask)
        both = valid & other.valid
        health["gap"] = ((other.distance - details.distance) * both).sum() / both.sum().clamp(min=1)
    return health


def gradient_norms(losses: list[Tensor], parameters: list[nn.Parameter]) -> Tensor | None:
    """Norm of each loss's gradient on some parameters, `(losses,)`; their graph stays for the backward pass.

    None if one reaches none of them.
    """
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        sizes = [g.float().norm() for g in gradients if g is not None]
        if not sizes:
            return None
        norms.append(torch.stack(sizes).norm())
    return torch.stack(norms)


def _of_another_sample(x: Tensor, blocks: int) -> Tensor:
    """Each block's samples moved on by one."""
    return x.unflatten(0, (blocks, -1)).roll(1, 1).flatten(0, 1)
