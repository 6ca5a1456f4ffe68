"""The losses of a grounding model with span heads: Moment-DETR's for moments, UMT's for saliency."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


DISTANCE, OVERLAP, SCORE = 10.0, 1.0, 4.0  # weights of the parts, in matching and in the loss
NO_MOMENT = 0.1  # weight of slots that match nothing


def saliency_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy with soft labels, averaged over clips whose label is known; 0 if there are none.

    Args:
        logits: `(batch, clips)`.
        labels: `(batch, clips)`, from 0 to 1; negative where that isn't known.
    """
    known = labels >= 0
    loss = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def span_loss(spans: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Moment-DETR's loss: each moment is matched with one slot; distance and overlap of those, and all slots' scores.

    Args:
        spans: `(batch, slots, 2)`, centre and width.
        scores: `(batch, slots, 2)`, logits of a moment and of none.
        labels: `(batch, moments, 2)`; negative where there is none.
    """
    rows, slots, moments = _match(spans, scores, labels)
    found, wanted = spans[rows, slots], labels[rows, moments]
    targets = torch.ones(scores.shape[:2], dtype=torch.long, device=scores.device)
    targets[rows, slots] = 0
    weight = scores.new_tensor([1.0, NO_MOMENT])
    loss = SCORE * F.cross_entropy(scores.transpose(1, 2), targets, weight=weight, reduction="none").mean()
    if len(rows):
        loss = loss + DISTANCE * F.l1_loss(found, wanted)
        loss = loss + OVERLAP * (1 - generalised_overlap(found, wanted)).mean()
    return loss


def generalised_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Generalised IoU of intervals: IoU, less the share of their hull that neither covers; from -1 to 1.

    Args:
        one: `(..., 2)`, centre and width.
        other: the same, of a shape that broadcasts with it.

    Returns:
        `(...)`.
    """
    (start, end), (other_start, other_end) = _ends(one), _ends(other)
    common = (torch.minimum(end, other_end) - torch.maximum(start, other_start)).clamp(min=0)
    either = (end - start) + (other_end - other_start) - common
    hull = torch.maximum(end, other_end) - torch.minimum(start, other_start)
    tiny = torch.finfo(hull.dtype).tiny
    return common / either.clamp(min=tiny) - (hull - either) / hull.clamp(min=tiny)


@torch.no_grad()
def _match(spans: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, slot and moment of each pair, by the cheapest assignment."""
    pairs = []
    cost = -SCORE * scores.float().softmax(-1)[..., :1]
    cost = cost + DISTANCE * torch.cdist(spans.float(), labels.float(), p=1)
    cost = cost - OVERLAP * generalised_overlap(spans[:, :, None].float(), labels[:, None].float())
    for row, (costs, there) in enumerate(zip(cost.cpu(), (labels >= 0).all(-1).cpu(), strict=True)):
        moments = there.nonzero()[:, 0]
        chosen, which = linear_sum_assignment(costs[:, moments].numpy())
        pairs += [(row, slot, int(moments[index])) for slot, index in zip(chosen, which, strict=True)]
    index = torch.tensor(pairs, dtype=torch.long, device=spans.device).reshape(-1, 3)
    return index[:, 0], index[:, 1], index[:, 2]


def _ends(spans: Tensor) -> tuple[Tensor, Tensor]:
    centre, half = spans[..., 0], spans[..., 1] / 2
    return centre - half, centre + half
