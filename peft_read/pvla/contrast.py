"""Batch negatives: each video's own sentence against the others', over all devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed


class Contrast(NamedTuple):
    """Of each sample.

    Attributes:
        loss: `(batch,)`; 0 where there is nothing to tell it from.
        compared: `(batch,)`, whether there is.
    """

    loss: Tensor
    compared: Tensor


def contrastive_losses(
    own_video: Tensor, own_words: Tensor, valid: Tensor, same: Tensor, temperature: float, first: int = 0
) -> Contrast:
    """InfoNCE in both directions, with the transport distance as the score (van den Oord et al. 2018, 1807.03748).

    A sample's loss is the mean of two cross entropies: its own sentence among all sentences, as far as each is from
    the sample's video; and its own video among all videos, as far as each is from the sample's sentence. The score of
    a pair is its distance over `-temperature`.

    Args:
        own_video: `(batch, all)`, the distance of each own video to every sentence.
        own_words: `(batch, all)`, the distance of each own sentence to every video.
        valid: `(all,)`, samples that have a frame and a word; the others are no negatives and have a loss of 0.
        same: `(batch, all)`, samples of the same sentence or video as the own one: no negatives either.
        temperature: of the softmax, in the unit of the distances.
        first: where the own samples begin among all.
    """
    batch = len(own_video)
    own = torch.arange(first, first + batch, device=own_video.device)
    is_own = F.one_hot(own, len(valid)).bool()
    left_out = ~is_own & (same | ~valid)
    losses = sum(
        F.cross_entropy((-distances / temperature).masked_fill(left_out, -torch.inf), own, reduction="none")
        for distances in (own_video, own_words)
    )
    compared = valid[own] & (~is_own & ~left_out).any(1)
    return Contrast(torch.where(valid[own], losses / 2, 0), compared)


def sentence_keys(ids: Tensor, counts: Tensor | None) -> Tensor:
    """What tells sentences made of the same words, whatever their order: `(batch, tokens)`.

    The ids of the words that count, the largest first, each raised by 1; then zeros. All zeros: not known.

    Args:
        ids: `(batch, tokens)`, of the tokenizer.
        counts: `(batch, tokens)`, true or above 0 where a token is a word that counts; None: all are.
    """
    raised = ids.long() + 1
    return (raised if counts is None else raised.masked_fill(counts <= 0, 0)).sort(descending=True).values


def same_keys(keys: Tensor, own: Tensor) -> Tensor:
    """Which sentences have the same words by `sentence_keys`: `(own, all)`, bool."""
    return (own[:, None] == keys).all(-1)


def same_states(words: Tensor, word_mask: Tensor, own: Tensor, own_mask: Tensor) -> Tensor:
    """Which sentences are made of words with the same states, whatever their order: `(own, all)`, bool.

    States are the same that differ by no more than rounding: a ten thousandth of their distance from the mean of all
    words, a millionth of that mean. Dropout, which gives a sentence other states each time, makes other ones of it.

    Args:
        words: `(all, words, dim)`, the states of all sentences.
        word_mask: `(all, words)`, true or above 0 where a word counts.
        own: `(own, words, dim)`, states of those to compare.
        own_mask: `(own, words)`.
    """
    counts, own_counts = word_mask > 0, own_mask > 0
    words, own = words.detach(), own.detach()
    mean = words.masked_fill(~counts[..., None], 0).sum((0, 1)) / counts.sum().clamp(min=1)
    words, own = (x - mean for x in (words, own))
    rounding = 1e-6 * mean.norm()
    rows = []
    for sentence, valid in zip(own, own_counts, strict=True):  # one by one: all pairs of all words would be too many
        among_all = _near(sentence, words.flatten(0, 1), rounding).view(len(sentence), *counts.shape) & counts
        among_own = _near(sentence, sentence, rounding) & valid
        as_often = among_all.sum(-1) == among_own.sum(-1, keepdim=True)
        rows.append((as_often | ~valid[:, None]).all(0) & (counts.sum(1) == valid.sum()))
    return torch.stack(rows)


def same_videos(video: Tensor, frame_mask: Tensor, own: slice) -> Tensor:
    """Which videos have the same states, frame by frame: `(own, all)`, bool.

    Told by the mean of the states, weighted by the root of their place, so as not to compare all pairs of frames.

    Args:
        video: `(all, frames, dim)`.
        frame_mask: `(all, frames)`, true where a frame is valid.
        own: those to compare.
    """
    places = (frame_mask.cumsum(1) * frame_mask).to(video.dtype).sqrt()
    means = torch.einsum("bfd,bf->bd", video.detach(), places / places.sum(1, keepdim=True).clamp(min=1))
    centre = means.mean(0)
    counts = frame_mask.sum(1)
    return _near(means[own] - centre, means - centre, 1e-6 * centre.norm()) & (counts[own, None] == counts)


def _near(some: Tensor, others: Tensor, rounding: Tensor) -> Tensor:
    # Distances by products of matrices are too rough to be told from 0.
    distances = torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist")
    return distances <= 1e-4 * some.norm(dim=1, keepdim=True) + rounding


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
    if torch.is_grad_enabled():  # the backward pass calls all processes, also one whose own states take no gradient
        tensors = tuple(x if x.ndim < 3 or x.requires_grad else x.detach().requires_grad_() for x in tensors)
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
