"""The loss of READ's partial video-language alignment: how far a sentence's words are from the video's frames."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import without_autocast
from .contrast import (
    contrastive_losses,
    gathered_over_devices,
    same_keys,
    same_states,
    same_videos,
    sentence_keys,
)
from .transport import capacities, partial_transport


COSTS = ("cosine", "sqeuclidean")
MARGINALS = ("unit", "uniform")
# Length below which a vector no longer has a direction: bounds the gradient of the cosine at a zero vector.
SHORTEST = 1e-3


class PvlaDetails(NamedTuple):
    """What `PvlaLoss` finds out about each sample.

    Attributes:
        loss: `(batch,)`, what is minimised: the distance or, with negatives, the contrast of the distances; 0 where
            nothing is valid; has a gradient.
        distance: `(batch,)`, cost of the transported mass per unit of it, 0 where nothing is valid; has a gradient.
        plan: `(batch, frames, words)`, the share of the transported mass that goes from each frame to each word.
        residual: `(batch,)`, how far from optimal the plan is, as a share of the transported mass.
        valid: `(batch,)`, whether there is a frame and a word that can carry mass.
        compared: `(batch,)`, whether the loss says something: as `valid` or, with negatives, where there are some.
    """

    loss: Tensor
    distance: Tensor
    plan: Tensor
    residual: Tensor
    valid: Tensor
    compared: Tensor


class PvlaLoss(nn.Module):
    """Distance between the frames of a video and the words of a sentence by partial optimal transport (PVLA).

    The mean over the valid samples of transport cost over transported mass (arXiv 2312.06950, the PVLA section), so
    that its size doesn't depend on `mass`. The paper takes the least over all masses; as costs aren't negative that is
    always the smallest mass, so the mass is an option here.

    In the paper's form the loss has no negatives: alone, it is least where all states are equal, so only the task's
    loss keeps states apart. `negatives=True` goes beyond the paper: each video's own sentence is told from the batch's
    other sentences, and each sentence's own video from the other videos (InfoNCE), with the distance as the score.
    Only for states of which frames and words haven't seen each other: in one sequence, frames would learn to repeat
    their own sentence.

    Args:
        mass: share of the mass that is matched, in (0, 1].
        reg: weight of the entropy; relative to a sample's mean cost with `cost="sqeuclidean"`.
        n_iter: iterations of the solver.
        cost: `"cosine"` distance, in [0, 2], or `"sqeuclidean"` distance, which can also be lowered by shrinking all
            states.
        marginals: `"unit"` or `"uniform"`, see [`partial_transport`].
        negatives: whether the batch's other samples are negatives. A batch of `n` is then a problem of `n * n` pairs.
            Sentences made of the same words aren't each other's negatives, nor are those of the same video. By
            themselves, words and videos are the same where their states are, as those of a table of embeddings; behind
            dropout words need their ids, see `details`, and a batch should have one sentence of each video.
        temperature: of the contrast, in the unit of the distances.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> frames = torch.eye(4)[None, :3]  # one video of three frames
        >>> loss = PvlaLoss(mass=0.5)
        >>> aligned, opposite = loss(frames, frames[:, :2]), loss(frames, -frames[:, :2])
        >>> round(aligned.item(), 3), round(opposite.item(), 3)
        (0.0, 1.0)
    """

    def __init__(
        self,
        mass: float = 0.5,
        reg: float = 0.05,
        n_iter: int = 50,
        cost: Literal["cosine", "sqeuclidean"] = "cosine",
        marginals: Literal["unit", "uniform"] = "unit",
        negatives: bool = False,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.mass = mass
        self.reg = reg
        self.n_iter = n_iter
        self.cost = cost
        self.marginals = marginals
        self.negatives = negatives
        self.temperature = temperature
        if isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass <= 1:
            raise ValueError(f"mass={mass!r}: expected a share of the mass in (0, 1].")
        if not reg > 0:
            raise ValueError(f"reg={reg}: expected a positive number.")
        if n_iter < 1:
            raise ValueError(f"n_iter={n_iter}: expected at least 1.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: expected a positive number.")
        for name, value, known in (("cost", cost, COSTS), ("marginals", marginals, MARGINALS)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}.")

    def forward(
        self, video: Tensor, words: Tensor, frame_mask: Tensor | None = None, word_mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; 0 if no sample is valid.

        Args:
            video: `(batch, frames, dim)`, states of the frames.
            words: `(batch, words, dim)`, states of the words.
            frame_mask: `(batch, frames)`, true where a frame is valid; all are by default.
            word_mask: `(batch, words)`, which words count, as a mask or as weights: a word of weight 0.5 carries at
                most half of what a word of weight 1 can, one of weight 0 takes no part. All count by default.

        Raises:
            ValueError: if the shapes don't fit, a weight is negative, or a frame mask has other values than 0 and 1.
        """
        details = self.details(video, words, frame_mask, word_mask)
        return details.loss.sum() / details.valid.sum().clamp(min=1)

    def details(
        self,
        video: Tensor,
        words: Tensor,
        frame_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
        *,
        across_devices: bool = False,
        tokens: tuple[Tensor, Tensor | None] | None = None,
    ) -> PvlaDetails:
        """Distances and plans, sample by sample; errors as of the call.

        Args:
            video: as of the call, like the next three.
            words: see there.
            frame_mask: see there.
            word_mask: see there.
            across_devices: whether the samples of all processes are negatives, too. All of them have to call then.
            tokens: ids, `(batch, tokens)`, and which of them are the sentence's words, as a mask or None: all are.
                They tell which sentences are made of the same words; None: the states of the words do.
        """
        _check(video, words, frame_mask, word_mask)
        frames_count, words_count = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            for x, mask in ((video, frame_mask), (words, word_mask))
        )
        frames_count = frames_count.bool()
        with without_autocast(video.device):
            dtype = torch.promote_types(torch.promote_types(video.dtype, words.dtype), torch.float32)
            # Without what lies in padding, which may be NaN.
            video = video.to(dtype).masked_fill(~frames_count[..., None], 0)
            words = words.to(dtype).masked_fill((words_count == 0)[..., None], 0)
            if not self.negatives:
                costs = self._costs(video, words, "bfd,bwd->bfw")
                distance, plan, residual, valid = self._transport(costs, frames_count, words_count)
                return PvlaDetails(distance, distance, plan, residual, valid, valid)
            return self._contrast(video, words, frames_count, words_count, tokens, across_devices)

    def without_negatives(self) -> PvlaLoss:
        """The distances alone."""
        return PvlaLoss(self.mass, self.reg, self.n_iter, self.cost, self.marginals)

    def _contrast(
        self,
        video: Tensor,
        words: Tensor,
        frames_count: Tensor,
        words_count: Tensor,
        tokens: tuple[Tensor, Tensor | None] | None,
        across_devices: bool,
    ) -> PvlaDetails:
        """Details of the own pairs, whose losses compare them with all others: one problem of all pairs."""
        batch, first = len(video), 0
        all_video, all_words, all_frames_count, all_words_count = video, words, frames_count, words_count
        keys = words.new_zeros(batch, 1, dtype=torch.long) if tokens is None else sentence_keys(*tokens)
        all_keys = keys
        if across_devices:
            masks = [x.to(video.dtype) for x in (frames_count, words_count)]
            gathered, first = gathered_over_devices(video, words, *masks, keys)
            all_video, all_words, all_frames_count, all_words_count, all_keys = gathered
            all_frames_count = all_frames_count.bool()
        everything = len(all_video)
        pairs = self._transport_pairs(video, all_words, frames_count, all_words_count)
        own = torch.arange(batch, device=video.device), torch.arange(first, first + batch, device=video.device)
        distance, plan, residual, valid = (x.unflatten(0, (batch, everything))[own] for x in pairs)
        by_video = pairs[0].view(batch, everything)
        by_words = by_video.T
        if everything > batch:
            by_words = self._transport_pairs(all_video, words, all_frames_count, words_count)[0]
            by_words = by_words.view(everything, batch).T
        own_keys = all_keys[first : first + batch]  # as long as those of the others
        same = same_keys(all_keys, own_keys)
        known = (all_keys > 0).any(1) | ~(all_words_count > 0).any(1)
        # On one device no value has to be waited for.
        if tokens is None or (everything > batch and not known.all()):
            by_states = same_states(all_words, all_words_count, words, words_count)
            same = torch.where(known[first : first + batch, None] & known, same, by_states)
        same = same | same_videos(all_video, all_frames_count, slice(first, first + batch))
        all_valid = all_frames_count.any(1) & (all_words_count > 0).any(1)
        loss, compared = contrastive_losses(by_video, by_words, all_valid, same, self.temperature, first)
        plan = plan[:, :, : words.shape[1]]  # other devices' sentences may be longer
        return PvlaDetails(loss, distance, plan, residual, valid, compared)

    def _transport_pairs(
        self, video: Tensor, words: Tensor, frames_count: Tensor, words_count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every video with every sentence, `(videos * sentences, ...)`."""
        costs = self._costs(video, words, "vfd,swd->vsfw")
        return self._transport(
            costs.flatten(0, 1),
            frames_count[:, None].expand(-1, len(words), -1).flatten(0, 1),
            words_count[None].expand(len(video), -1, -1).flatten(0, 1),
        )

    def _transport(
        self, costs: Tensor, frames_count: Tensor, words_count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distance, plan, residual and validity of each pair."""
        word_mask = words_count > 0
        unit = _mean_cost(costs, frames_count, word_mask) if self.cost == "sqeuclidean" else costs.new_ones(len(costs))
        marginals, mass = self.marginals, costs.new_tensor(self.mass)
        if words_count.is_floating_point():
            of_frames, of_words, _ = capacities(costs, self.marginals, frames_count, word_mask)
            of_words = of_words * words_count
            marginals = (of_frames, of_words)  # type: ignore[assignment]
            mass = self.mass * torch.minimum(of_frames.sum(1), of_words.sum(1))
        found = partial_transport(
            costs / unit[:, None, None],
            self.mass,
            self.reg,
            frame_mask=frames_count,
            word_mask=word_mask,
            marginals=marginals,
            n_iter=self.n_iter,
        )
        valid = frames_count.any(1) & word_mask.any(1)
        mass = torch.where(valid, mass, 1)
        return found.cost / mass * unit, found.plan / mass[:, None, None], found.residual, valid

    def _costs(self, video: Tensor, words: Tensor, pairs: str) -> Tensor:
        """`(..., frames, words)`, of those pairs of videos and sentences that the equation of an einsum says."""
        if self.cost == "cosine":
            x, y = (z * (z.square().sum(-1, keepdim=True) + SHORTEST**2).rsqrt() for z in (video, words))
            return (1 - torch.einsum(pairs, x, y)).clamp(min=0)
        of_frames, of_words = video.square().sum(-1), words.square().sum(-1)
        of_frames = of_frames[:, :, None] if pairs.startswith("b") else of_frames[:, None, :, None]
        return F.relu(of_frames + of_words[:, None] - 2 * torch.einsum(pairs, video, words))

    def extra_repr(self) -> str:
        """The options, for `print`."""
        options = f"mass={self.mass}, reg={self.reg}, n_iter={self.n_iter}, cost={self.cost!r}"
        options += f", marginals={self.marginals!r}"
        return options + (f", negatives=True, temperature={self.temperature}" if self.negatives else "")


def _mean_cost(costs: Tensor, frame_mask: Tensor, word_mask: Tensor) -> Tensor:
    """Mean over a sample's valid pairs, a constant to the gradient; 1 where all costs are 0."""
    pairs = frame_mask[:, :, None] & word_mask[:, None, :]
    mean = (costs.detach() * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    return mean.where(mean != 0, 1)


def _check(video: Tensor, words: Tensor, frame_mask: Tensor | None, word_mask: Tensor | None) -> None:
    for name, states, points in (("video", video, "frames"), ("words", words, "words")):
        if states.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(states.shape)}; expected (batch, {points}, dim).")
    if len(video) != len(words):
        raise ValueError(f"{len(video)} videos but {len(words)} sentences; expected one sentence for each video.")
    if video.shape[-1] != words.shape[-1]:
        raise ValueError(
            f"Video states have {video.shape[-1]} features, words {words.shape[-1]}: distances need a common space. "
            "Project one into the other's, by the model's own projections where it has some, before the loss."
        )
    if frame_mask is not None and frame_mask.shape != video.shape[:2]:
        raise ValueError(f"frame_mask has shape {tuple(frame_mask.shape)}; the video has {tuple(video.shape[:2])}.")
    if frame_mask is not None and frame_mask.dtype != torch.bool and not ((frame_mask == 0) | (frame_mask == 1)).all():
        raise ValueError(
            "frame_mask has values other than 0 and 1: a frame is valid or it isn't. Only words have weights; give "
            "`frame_mask > 0`, or a threshold of your own, to say which frames are meant."
        )
    if word_mask is not None and word_mask.shape != words.shape[:2]:
        raise ValueError(f"word_mask has shape {tuple(word_mask.shape)}; the words have {tuple(words.shape[:2])}.")
    if word_mask is None or word_mask.device.type != "cpu" or word_mask.dtype == torch.bool:
        return
    if word_mask.is_floating_point():
        if not ((word_mask >= 0) & word_mask.isfinite()).all():
            raise ValueError("word_mask has negative, infinite or NaN weights; expected 0 or more for each word.")
    elif not ((word_mask == 0) | (word_mask == 1)).all():
        raise ValueError("word_mask has integers other than 0 and 1: give weights as floating-point numbers.")
