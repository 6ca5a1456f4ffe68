"""The weights of LSTTA at one block of a tower: into the bottleneck, and out of it again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..precision import layer_norm, linear, without_autocast
from .config import LsttaConfig
from .interaction import FrameFilter


class LsttaAdapter(nn.Module):
    """All weights of LSTTA that act on the tokens of one block.

    Tokens go in by `project`, and what the interaction makes of them comes out by `change`. Computed in float32 at
    least, whatever the weights and the surroundings are in.

    Args:
        width: size of the block's hidden states.
        config: widths and settings.
        judges_frames: whether this adapter holds the frame filter, as those of the vision tower do.
    """

    def __init__(self, width: int, config: LsttaConfig, judges_frames: bool) -> None:
        super().__init__()
        r = config.r
        self.window = config.window
        self.num_audio_windows = config.num_audio_windows
        self.num_heads = config.num_heads
        self.scaling = float(config.scaling)
        self.activation = ACT2FN[config.act_fn]
        # PEFT tells the modules of `modules_to_save` by their endings: these names end like no usual module.
        self.normalizer = nn.LayerNorm(width)
        self.downward = nn.Linear(width, r)
        self.projections = nn.Linear(r, 3 * r)
        self.outward = nn.Linear(r, r)
        self.upward = nn.Linear(r, width)
        self.dropping = nn.Dropout(config.dropout)
        filters = judges_frames and config.frame_filter
        self.judge = FrameFilter(r, config.num_heads, config.filter_form) if filters else None
        if config.init_weights:
            nn.init.zeros_(self.upward.weight)
            nn.init.zeros_(self.upward.bias)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return torch.promote_types(self.downward.weight.dtype, torch.float32)

    def project(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values of tokens: `(..., width)` to `(..., 3 * r)`."""
        with without_autocast(hidden.device):
            bottleneck = self.activation(linear(layer_norm(hidden, self.normalizer), self.downward))
            return linear(bottleneck, self.projections)

    def change(self, messages: Tensor) -> Tensor:
        """What is added to hidden states of tokens that are told this: `(..., r)` to `(..., width)`."""
        with without_autocast(messages.device):
            return self.scaling * self.dropping(linear(linear(messages, self.outward), self.upward))
