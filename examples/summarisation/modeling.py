"""An encoder-decoder that reads what is said and the frames of a video as one sequence, and writes a summary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput


class SummaryConfig(PreTrainedConfig):
    """Configuration of [`SummaryModel`].

    Args:
        text_config: configuration of the encoder-decoder (T5, BART, ...), as an object or a dict.
        feature_size: size of a frame's features.
    """

    model_type = "video_summary"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self, text_config: PreTrainedConfig | dict[str, Any] | None = None, feature_size: int = 2048, **kwargs: Any
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = AutoConfig.for_model("bart") if text_config is None else text_config
        self.feature_size = feature_size
        super().__init__(**kwargs)


class SummaryModel(PreTrainedModel):
    """Writes a summary of a video's frames and, where there is one, its transcript.

    The frames are projected into the embedding space of an encoder-decoder, and run through its encoder behind the
    words of the transcript, as one sequence.
    """

    config_class = SummaryConfig
    base_model_prefix = "summary"
    supports_gradient_checkpointing = True

    def __init__(self, config: SummaryConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.text_model = AutoModelForSeq2SeqLM.from_config(config.text_config) if text_model is None else text_model
        width = self.text_model.get_input_embeddings().weight.shape[1]
        self.frame_projection = nn.Linear(config.feature_size, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the words."""
        return self.text_model.get_input_embeddings()

    def forward(
        self,
        frame_features: Tensor,
        frame_mask: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Seq2SeqLMOutput:
        """Rate the words of a summary.

        Args:
            frame_features: `(batch, frames, feature_size)`.
            frame_mask: `(batch, frames)`, true where a frame is valid.
            input_ids: `(batch, words)`, the transcript; None without one.
            attention_mask: `(batch, words)`, 1 where a word is valid; None: all are.
            labels: `(batch, length)`, the summary's tokens; -100 for padding.
        """
        inputs = self._encoder_inputs(frame_features, frame_mask, input_ids, attention_mask)
        return self.text_model(**inputs, labels=labels)

    def generate(
        self,
        frame_features: Tensor,
        frame_mask: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The tokens of summaries, `(batch, length)`.

        Args:
            frame_features: `(batch, frames, feature_size)`.
            frame_mask: `(batch, frames)`.
            input_ids: `(batch, words)`; None without a transcript.
            attention_mask: `(batch, words)`.
            options: of transformers' `generate`.
        """
        inputs = self._encoder_inputs(frame_features, frame_mask, input_ids, attention_mask)
        return self.text_model.generate(**inputs, **options)

    def _encoder_inputs(
        self, frames: Tensor, frame_mask: Tensor, words: Tensor | None, word_mask: Tensor | None
    ) -> dict[str, Tensor]:
        sequence, mask = self.frame_projection(frames), frame_mask.bool()
        if words is not None:
            valid = torch.ones_like(words, dtype=torch.bool) if word_mask is None else word_mask.bool()
            sequence = torch.cat([self.get_input_embeddings()(words), sequence], dim=1)
            mask = torch.cat([valid, mask], dim=1)
            # Valid tokens first, so that a padded transcript leaves no hole: every model's positions then fit.
            order = torch.argsort(mask.logical_not(), dim=1, stable=True)
            sequence = sequence.gather(1, order[..., None].expand_as(sequence))
            mask = mask.gather(1, order)
        return {"inputs_embeds": sequence, "attention_mask": mask.long()}


AutoConfig.register(SummaryConfig.model_type, SummaryConfig)
AutoModel.register(SummaryConfig, SummaryModel)
