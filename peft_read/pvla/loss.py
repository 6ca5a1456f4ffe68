"""The loss of READ's partial video-language alignment: how far a sentence's words are from the video's frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import without_autocast
from .transport import PartialTransport, partial_transport


COSTS = ("cosine", "sqeuclidean")
MARGINALS = ("unit", "uniform")
# Length below which a vector no longer has a direction: bounds the gradient of the cosine at a zero vector.
SHORTEST = 1e-3


class PvlaDetails(NamedTuple):
    """What `PvlaLoss` finds out about each sample; the mean over the masses, where there are several.

    Attributes:
        distance: `(batch,)`, cost of the transported mass per unit of it, 0 where nothing is valid; has a gradient.
        plan: `(batch, frames, words)`, the share of the transported mass that goes from each frame to each word.
        residual: `(batch,)`, how far from optimal the plan is, as a share of the transported mass.
        valid: `(batch,)`, whether there is a valid frame and a valid word.
    """

    distance: Tensor
    plan: Tensor
    residual: Tensor
    valid: Tensor


class PvlaLoss(nn.Module):
    """Distance between the frames of a video and the words of a sentence by partial optimal transport (PVLA).

    The mean over the valid samples of transport cost over transported mass (arXiv 2312.06950, the PVLA section), so
    that its size doesn't depend on `mass`. The paper takes the least over all masses; as costs aren't negative that is
    always the smallest mass, so the mass is an option here. The loss has no negatives: alone, it is least where all
    states are equal, so only the task's loss keeps states apart.

    Args:
        mass: share of the mass that is matched, in (0, 1]; of several, the average is taken.
        reg: weight of the entropy; relative to a sample's mean cost with `cost="sqeuclidean"`.
        n_iter: iterations of the solver.
        cost: `"cosine"` distance, in [0, 2], or `"sqeuclidean"` distance, which can also be lowered by shrinking all
            states.
        marginals: `"unit"` or `"uniform"`, see [`partial_transport`].

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
        mass: float | Sequence[float] = 0.5,
        reg: float = 0.05,
        n_iter: int = 50,
        cost: Literal["cosine", "sqeuclidean"] = "cosine",
        marginals: Literal["unit", "uniform"] = "unit",
    ) -> None:
        super().__init__()
        self.masses = tuple(mass) if isinstance(mass, Sequence) else (mass,)
        self.reg = reg
        self.n_iter = n_iter
        self.cost = cost
        self.marginals = marginals
        if not self.masses or not all(0 < share <= 1 for share in self.masses):
            raise ValueError(f"mass={mass}: expected a share of the mass in (0, 1], or several.")
        if not reg > 0:
            raise ValueError(f"reg={reg}: expected a positive number.")
        if n_iter < 1:
            raise ValueError(f"n_iter={n_iter}: expected at least 1.")
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
            word_mask: `(batch, words)`, likewise.

        Raises:
            ValueError: if the shapes don't fit.
        """
        details = self.details(video, words, frame_mask, word_mask)
        return details.distance.sum() / details.valid.sum().clamp(min=1)

    def details(
        self, video: Tensor, words: Tensor, frame_mask: Tensor | None = None, word_mask: Tensor | None = None
    ) -> PvlaDetails:
        """Distances and plans, sample by sample; arguments and errors as of the call."""
        _check(video, words, frame_mask, word_mask)
        batch, masses = len(video), len(self.masses)
        frame_mask, word_mask = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
            for x, mask in ((video, frame_mask), (words, word_mask))
        )
        with without_autocast(video.device):
            costs = self._costs(video, words, frame_mask, word_mask)
            unit = _mean_cost(costs, frame_mask, word_mask) if self.cost == "sqeuclidean" else costs.new_ones(batch)
            share = torch.tensor(self.masses, dtype=costs.dtype, device=costs.device)
            found = partial_transport(
                (costs / unit[:, None, None]).repeat(masses, 1, 1),
                share.repeat_interleave(batch) if masses > 1 else self.masses[0],
                self.reg,
                frame_mask=frame_mask.repeat(masses, 1),
                word_mask=word_mask.repeat(masses, 1),
                marginals=self.marginals,
                n_iter=self.n_iter,
            )
            by_mass = PartialTransport(*(x.unflatten(0, (masses, batch)) for x in found))
            return PvlaDetails(
                distance=(by_mass.cost / share[:, None]).mean(0) * unit,
                plan=(by_mass.plan / share[:, None, None, None]).mean(0),
                residual=by_mass.residual.mean(0),
                valid=frame_mask.any(1) & word_mask.any(1),
            )

    def _costs(self, video: Tensor, words: Tensor, frame_mask: Tensor, word_mask: Tensor) -> Tensor:
        """`(batch, frames, words)` in float32 at least; without what lies in padding, which may be NaN."""
        dtype = torch.promote_types(torch.promote_types(video.dtype, words.dtype), torch.float32)
        x = video.to(dtype).masked_fill(~frame_mask[..., None], 0)
        y = words.to(dtype).masked_fill(~word_mask[..., None], 0)
        if self.cost == "cosine":
            x, y = (z * (z.square().sum(-1, keepdim=True) + SHORTEST**2).rsqrt() for z in (x, y))
            return (1 - x @ y.mT).clamp(min=0)
        squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :]
        return F.relu(squares - 2 * x @ y.mT)

    def extra_repr(self) -> str:
        """The options, for `print`."""
        mass = self.masses[0] if len(self.masses) == 1 else self.masses
        return f"mass={mass}, reg={self.reg}, n_iter={self.n_iter}, cost={self.cost!r}, marginals={self.marginals!r}"


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
    if word_mask is not None and word_mask.shape != words.shape[:2]:
        raise ValueError(f"word_mask has shape {tuple(word_mask.shape)}; the words have {tuple(words.shape[:2])}.")
