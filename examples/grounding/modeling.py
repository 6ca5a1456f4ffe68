"""A grounding model on features, in the shape of Moment-DETR: which moments does a sentence mean, and how much?

Sentence and clips run through the encoder of transformers' DETR as one sequence, batch first; a head reads the
saliency of each clip off its last state. Slots run through the decoder; two heads read a moment and a score off each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DetrConfig, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.detr.modeling_detr import DetrDecoder, DetrEncoder
from transformers.utils import ModelOutput

from .losses import saliency_loss, span_loss


class MomentConfig(PreTrainedConfig):
    """Configuration of [`MomentModel`]; the defaults are Moment-DETR's on QVHighlights.

    Args:
        video_size: size of a clip's features.
        text_size: size of a token's features; None where there are no sentences.
        hidden_size: width of the blocks.
        encoder_layers: blocks through which sentence and clips run.
        decoder_layers: blocks through which the slots run.
        num_attention_heads: of each block.
        intermediate_size: width of the feed-forward parts.
        num_slots: moments that are predicted; 0: none, only the saliency is.
        dropout: in the blocks.
        input_dropout: of the features.
        saliency_weight: of the saliency's loss, beside 10, 1 and 4 of the moments' (distance, overlap, score).
    """

    model_type = "moment_grounding"

    def __init__(
        self,
        video_size: int = 2818,
        text_size: int | None = 512,
        hidden_size: int = 256,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        num_attention_heads: int = 8,
        intermediate_size: int = 1024,
        num_slots: int = 10,
        dropout: float = 0.1,
        input_dropout: float = 0.5,
        saliency_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.video_size = video_size
        self.text_size = text_size
        self.hidden_size = hidden_size
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_slots = num_slots
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.saliency_weight = saliency_weight
        super().__init__(**kwargs)

    def blocks(self) -> DetrConfig:
        """What DETR's encoder and decoder are made of."""
        return DetrConfig(
            backbone_config=ResNetConfig(),  # of a model that isn't made here
            use_timm_backbone=False,
            d_model=self.hidden_size,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=self.intermediate_size,
            decoder_ffn_dim=self.intermediate_size,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            auxiliary_loss=True,
        )


@dataclass
class MomentOutput(ModelOutput):
    """What the model makes of a batch.

    Attributes:
        loss: with labels only.
        saliency: `(batch, clips)`, logits.
        spans: `(batch, slots, 2)`: centre and width of a moment, as shares of the video.
        span_scores: `(batch, slots)`, from 0 to 1.
    """

    loss: Tensor | None = None
    saliency: Tensor | None = None
    spans: Tensor | None = None
    span_scores: Tensor | None = None


class SequenceEncoder(DetrEncoder):
    """DETR's encoder over a sequence of words and clips, whose states PVLA can compare; the slots' it can't."""

    input_modalities = ("text", "video")


class FeatureProjection(nn.Sequential):
    """Features into the blocks' width, by two layers as in Moment-DETR.

    Args:
        size: of the features.
        width: of the blocks.
        dropout: of what goes into each layer.
    """

    def __init__(self, size: int, width: int, dropout: float) -> None:
        first = [nn.LayerNorm(size), nn.Dropout(dropout), nn.Linear(size, width), nn.ReLU()]
        super().__init__(*first, nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, width))


class MomentModel(PreTrainedModel):
    """Finds the moments that a sentence means, and rates every clip.

    The sentence comes first in the sequence: attention doesn't mind, and a recurrence over it knows what is looked for
    when it comes to the clips.
    """

    config_class = MomentConfig
    base_model_prefix = "grounding"
    main_input_name = "video_features"
    input_modalities = ("text", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DetrEncoderLayer", "DetrDecoderLayer"]

    def __init__(self, config: MomentConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.video_projection = FeatureProjection(config.video_size, width, config.input_dropout)
        if config.text_size is not None:
            self.text_projection = FeatureProjection(config.text_size, width, config.input_dropout)
        self.encoder = SequenceEncoder(config.blocks())
        self.saliency_head = nn.Linear(width, 1)
        if config.num_slots:
            self.slots = nn.Embedding(config.num_slots, width)
            self.decoder = DetrDecoder(config.blocks())
            layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)]
            self.span_head = nn.Sequential(*layers)
            self.score_head = nn.Linear(width, 2)  # a moment, or none
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def forward(
        self,
        video_features: Tensor,
        video_mask: Tensor,
        text_features: Tensor | None = None,
        text_mask: Tensor | None = None,
        saliency_labels: Tensor | None = None,
        span_labels: Tensor | None = None,
    ) -> MomentOutput:
        """Rate the clips and find the moments.

        Args:
            video_features: `(batch, clips, video_size)`.
            video_mask: `(batch, clips)`, true where a clip is valid.
            text_features: `(batch, tokens, text_size)`.
            text_mask: `(batch, tokens)`, true where a token is valid.
            saliency_labels: `(batch, clips)`, from 0 to 1; negative where that isn't known.
            span_labels: `(batch, moments, 2)`, centre and width as shares of the video; negative where there is none.
        """
        states, mask, positions = self._sequence(video_features, video_mask, text_features, text_mask)
        encoded = self.encoder(
            inputs_embeds=states, attention_mask=mask, spatial_position_embeddings=positions
        ).last_hidden_state
        clips = encoded[:, -video_features.shape[1] :]
        output = MomentOutput(saliency=self.saliency_head(clips)[..., 0])
        losses = []
        if saliency_labels is not None:
            assert output.saliency is not None
            losses.append(self.config.saliency_weight * saliency_loss(output.saliency, saliency_labels))
        if self.config.num_slots:
            slots = self.slots.weight.expand(len(states), -1, -1)
            decoded = self.decoder(
                inputs_embeds=torch.zeros_like(slots),
                object_queries_position_embeddings=slots,
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                spatial_position_embeddings=positions,
            )
            layers = decoded.intermediate_hidden_states
            spans, scores = self.span_head(layers).sigmoid(), self.score_head(layers)
            output.spans, output.span_scores = spans[-1], scores[-1].softmax(-1)[..., 0]
            if span_labels is not None:  # after every block, as in DETR
                losses += [span_loss(*each, span_labels) for each in zip(spans, scores, strict=True)]
        if losses:
            output.loss = torch.stack(losses).sum()
        return output

    def _sequence(
        self, video: Tensor, video_mask: Tensor, text: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected words and clips, which are valid, and positions in time: words have none."""
        states, mask = self.video_projection(video), video_mask.bool()
        positions = sine_positions(mask, states.shape[-1]).to(states.dtype)
        if (text is None) != (self.config.text_size is None):
            given = "without" if text is None else "with"
            raise ValueError(f"The model has text_size={self.config.text_size}, but was called {given} text_features.")
        if text is not None:
            words = self.text_projection(text)
            text_mask = (
                torch.ones(words.shape[:2], dtype=torch.bool, device=words.device) if text_mask is None else text_mask
            )
            states, mask = torch.cat([words, states], dim=1), torch.cat([text_mask.bool(), mask], dim=1)
            positions = torch.cat([torch.zeros_like(words), positions], dim=1)
        return states, mask.long(), positions


def sine_positions(mask: Tensor, size: int) -> Tensor:
    """Where each valid clip is in its own video, as sines and cosines.

    Args:
        mask: `(batch, clips)`, bool.
        size: of a position; even.

    Returns:
        `(batch, clips, size)`, float32.
    """
    count = mask.cumsum(1).float()
    angle = 2 * math.pi * count / (count[:, -1:] + 1e-6)
    wavelengths = 10000 ** (2 * torch.arange(size // 2, device=mask.device) / size)
    angles = angle[..., None] / wavelengths
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)


AutoConfig.register(MomentConfig.model_type, MomentConfig)
AutoModel.register(MomentConfig, MomentModel)
