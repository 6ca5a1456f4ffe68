"""Batch negatives: each video's own sentence against the others', over all devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed


def contrastive_losses(
    own_video: Tensor, own_words: Tensor, valid: Tensor, same: Tensor, temperature: float, first: int = 0
) -> Tensor:
    """InfoNCE in both directions, with the transport distance as the score (van den Oord et al. 2018, 1807.03748).

    A sample's loss is the mean of two cross entropies: its own sentence among all sentences, as far as each is from
    the sample's video; and its own video among all videos, as far as each is from the sample's sentence. The score of
    a pair is its distance over `-temperature`.

    Args:
        own_video: `(batch, all)`, the distance of each own video to every sentence.
        own_words: `(batch, all)`, the distance of each own sentence to every video.
        valid: `(all,)`, samples that have a frame and a word; the others are no negatives and have a loss of 0.
        same: `(batch, all)`, sentences that say the same as the own one: no negatives either.
        temperature: of the softmax, in the unit of the distances.
        first: where the own samples begin among all.

    Returns:
        `(batch,)`.
    """
    batch = len(own_video)
    own = torch.arange(first, first + batch, device=own_video.device)
    is_own = F.one_hot(own, len(valid)).bool()
    left_out = ~is_own & (same | ~valid)
    losses = sum(
        F.cross_entropy((-distances / temperature).masked_fill(left_out, -torch.inf), own, reduction="none")
        for distances in (own_video, own_words)
    )
    return torch.where(valid[own], losses / 2, 0)


def same_sentences(words: Tensor, word_mask: Tensor, own: Tensor, own_mask: Tensor) -> Tensor:
    """Which sentences are made of the same words, whatever their order: `(own, all)`, bool.

    Told by the sums of the words' states, which differ where a word does.

    Args:
        words: `(all, words, dim)`, the states of all sentences.
        word_mask: `(all, words)`, true or above 0 where a word counts.
        own: `(own, words, dim)`, states of those to compare.
        own_mask: `(own, words)`.
    """
    sums, own_sums = (
        states.detach().float().masked_fill(mask[..., None] == 0, 0).sum(1)
        for states, mask in ((words, word_mask), (own, own_mask))
    )
    scale = own_sums.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return (own_sums[:, None] - sums).norm(dim=-1) <= 1e-4 * scale


def gathered_over_devices(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """Tensors of all processes, one process after the other, with their gradient; and where the own ones begin.

    Sizes may differ between processes: shorter ones are filled up with zeros, in the batch as well, which masks that
    come along then tell. A batch's gradient comes back from every process that compared it.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return list(tensors), 0
    largest = torch.tensor([size for tensor in tensors for size in tensor.shape[:2]], device=tensors[0].device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    sizes = largest.view(-1, 2).tolist()
    gathered = [_AllGather.apply(_filled_up(x, *size)) for x, size in zip(tensors, sizes, strict=True)]
    return gathered, distributed.get_rank() * sizes[0][0]


def _filled_up(x: Tensor, batch: int, points: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.ndim - 2) + [0, points - x.shape[1], 0, batch - len(x)])


class _AllGather(torch.autograd.Function):
    """Tensors of equal shapes from all processes, behind each other; the gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]
