"""A text transformer that reads a query and the frames of a video as one sequence and rates every frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from peft_read.tuners.sharding import blocks_to_shard


class GroundingConfig(PreTrainedConfig):
    """Configuration of [`GroundingModel`].

    Args:
        text_config: configuration of the text transformer, as an object or a dict.
        feature_size: size of a frame's features.
        sep_token_id: token that ends the frames; None if the tokenizer has no such token.
    """

    model_type = "video_grounding"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        feature_size: int = 64,
        sep_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = AutoConfig.for_model("bert") if text_config is None else text_config
        self.feature_size = feature_size
        self.sep_token_id = sep_token_id
        super().__init__(**kwargs)


@dataclass
class GroundingOutput(ModelOutput):
    """Attributes: `loss`, with labels only; `logits (batch, frames)`, the saliency of each frame."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class GroundingModel(PreTrainedModel):
    """Rates the frames of a video by how well a query means them.

    Query and frames run through a text transformer as one sequence, `[CLS] query [SEP] frames [SEP]`; the frames are
    projected into its embedding space, and a linear head reads the saliency off their last states.
    """

    config_class = GroundingConfig
    base_model_prefix = "grounding"
    supports_gradient_checkpointing = True

    def __init__(self, config: GroundingConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.text_model = AutoModel.from_config(config.text_config) if text_model is None else text_model
        width = self.text_model.get_input_embeddings().weight.shape[1]
        self.frame_projection = nn.Linear(config.feature_size, width)
        self.saliency_head = nn.Linear(self.text_model.config.hidden_size, 1)
        self.post_init()
        self._no_split_modules = set(blocks_to_shard(self))  # also where only the head is trained

    def get_input_embeddings(self) -> nn.Module:
        """Those of the words."""
        return self.text_model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        frame_features: Tensor,
        frame_mask: Tensor,
        labels: Tensor | None = None,
    ) -> GroundingOutput:
        """Rate the frames.

        Args:
            input_ids: `(batch, words)`, the query with the special tokens of its tokenizer.
            attention_mask: `(batch, words)`, 1 where a word is valid.
            frame_features: `(batch, frames, feature_size)`.
            frame_mask: `(batch, frames)`, true where a frame is valid.
            labels: `(batch, frames)`, 1 for frames that the query means, else 0.
        """
        embed = self.text_model.get_input_embeddings()
        parts = [embed(input_ids), self.frame_projection(frame_features)]
        masks = [attention_mask.bool(), frame_mask.bool()]
        if self.config.sep_token_id is not None:
            separator = torch.full_like(input_ids[:, :1], self.config.sep_token_id)
            parts.append(embed(separator))
            masks.append(torch.ones_like(separator, dtype=torch.bool))
        sequence, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        segment = torch.ones_like(mask, dtype=torch.long)
        segment[:, : input_ids.shape[1]] = 0

        # Valid tokens first, so that a padded query leaves no hole: every model's positions then fit.
        order = torch.argsort(mask.logical_not(), dim=1, stable=True)
        inputs = {
            "inputs_embeds": sequence.gather(1, order[..., None].expand_as(sequence)),
            "attention_mask": mask.gather(1, order).long(),
        }
        if getattr(self.text_model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segment.gather(1, order)
        states = self.text_model(**inputs).last_hidden_state
        position = attention_mask.bool().sum(1, keepdim=True) + frame_mask.long().cumsum(1) - 1
        frames = states.gather(1, position[..., None].expand(-1, -1, states.shape[-1]))
        logits = self.saliency_head(frames)[..., 0]
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits[frame_mask.bool()], labels[frame_mask.bool()])
        return GroundingOutput(loss=loss, logits=logits)


AutoConfig.register(GroundingConfig.model_type, GroundingConfig)
AutoModel.register(GroundingConfig, GroundingModel)
