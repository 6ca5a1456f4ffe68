"""How several towers' outputs become one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def masked_mean(values: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Mean over time of what is real; what isn't may hold anything, even NaN.

    Args:
        values: `(batch, time, dim)`.
        mask: `(batch, time)`, bool, true where real; None where all is.
        weights: `(batch, time)`, at least 0, how much each counts; all alike where None. Only their ratios matter.

    Returns:
        `(batch, dim)`; zeros for a sample in which nothing is real.
    """
    if mask is None and weights is None:
        return values.mean(1)
    if weights is None:
        assert mask is not None
        values = values.masked_fill(~mask[..., None], 0.0)
        return values.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    if mask is not None:
        values, weights = values.masked_fill(~mask[..., None], 0.0), weights.masked_fill(~mask, 0.0)
    shares = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (values * shares[..., None].to(values.dtype)).sum(1)


class ModalityFusion(nn.Module):
    """The mean of all modalities that are there, each normalised and projected to one size, and normalised again.

    A modality that a sample doesn't have has no part in its mean, whether it is absent from the batch or masked out.

    Args:
        widths: size of each modality's vector, by its name.
        dim: size of the fused vector.
    """

    def __init__(self, widths: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in widths.items()})
        self.projections = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in widths.items()})
        self.norm = nn.LayerNorm(dim)

    def forward(self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor | None]) -> Tensor:
        """Fuse.

        Args:
            vectors: by modality, `(..., width)`; leading dimensions of 1 stand for as many as others have.
            present: by modality, `(...)`, bool, whether a sample has it; None if all have.

        Returns:
            `(..., dim)`.
        """
        total: Tensor | float = 0.0
        count: Tensor | float = 0.0
        for name, vector in vectors.items():
            projected = self.projections[name](self.norms[name](vector.to(self.norm.weight.dtype)))
            there = present[name]
            if there is None:
                there = torch.ones(projected.shape[:-1], dtype=torch.bool, device=projected.device)
            total = total + projected.masked_fill(~there[..., None], 0.0)
            count = count + there[..., None].to(projected.dtype)
        assert isinstance(total, Tensor)
        assert isinstance(count, Tensor)
        fused: Tensor = self.norm(total / count.clamp(min=1))
        return fused
