"""Trimodal models with heads: for a whole sample, and for every frame."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils.generic import can_return_tuple

from .configuration import TrimodalConfig
from .losses import classification_loss
from .modeling import TrimodalModel, TrimodalOutput


class TrimodalForSequenceClassification(TrimodalModel):
    """A trimodal model that answers with a label, several labels, or numbers.

    `config.problem_type` is as everywhere in transformers: `"single_label_classification"`,
    `"multi_label_classification"` or `"regression"`; told from `num_labels` and the labels' type if it isn't set.
    """

    def _add_head(self) -> None:
        self.classifier = nn.Linear(self.config.projection_dim, self.config.num_labels or 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        labels: Tensor | None = None,
    ) -> TrimodalOutput:
        """As in [`TrimodalModel`], with `logits (batch, labels)`, and with a loss where `labels` are given.

        Labels are `(batch,)` of classes, where -100 counts for nothing; `(batch, labels)` of 0 and 1; or numbers,
        `(batch,)` or `(batch, labels)`. All inputs are those of [`TrimodalModel`].
        """
        batch = self._batch(
            {"pixel_values": pixel_values},
            {"input_values": input_values, "input_features": input_features},
            {"input_ids": input_ids, "inputs_embeds": inputs_embeds},
            {"vision": frame_mask, "audio": audio_mask, "text": attention_mask},
        )
        output, fused = self._encode(batch, output_hidden_states, output_attentions)
        logits = self.classifier(fused)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return TrimodalOutput(loss=loss, logits=logits, **output)


class TrimodalForFrameClassification(TrimodalModel):
    """A trimodal model that gives every frame a label, several labels, or a number such as its saliency.

    A frame's vector takes the place of the video's mean in the fusion; its logits are made of that. Both frames of a
    tubelet have its vector. `config.problem_type` is as in [`TrimodalForSequenceClassification`].
    """

    def _add_head(self) -> None:
        if self.vision_model is None:
            raise ValueError("A TrimodalForFrameClassification needs a vision tower: give it `vision`.")
        self.classifier = nn.Linear(self.config.projection_dim, self.config.num_labels or 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        labels: Tensor | None = None,
    ) -> TrimodalOutput:
        """As in [`TrimodalModel`], with `logits (batch, frames, labels)`, and with a loss where `labels` are given.

        Labels are `(batch, frames)` of classes; `(batch, frames, labels)` of 0 and 1; or numbers, `(batch, frames)` or
        `(batch, frames, labels)`. Padded frames, and those labelled -100, count for nothing. All inputs are those of
        [`TrimodalModel`].

        Raises:
            ValueError: if there are no `pixel_values`.
        """
        if pixel_values is None:
            raise ValueError("There are no frames to classify: give `pixel_values`.")
        batch = self._batch(
            {"pixel_values": pixel_values},
            {"input_values": input_values, "input_features": input_features},
            {"input_ids": input_ids, "inputs_embeds": inputs_embeds},
            {"vision": frame_mask, "audio": audio_mask, "text": attention_mask},
        )
        output, frames = self._encode(batch, output_hidden_states, output_attentions, frames=True)
        logits = self.classifier(frames)
        mask = batch[1].towers["vision"].mask
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type, mask)
        return TrimodalOutput(loss=loss, logits=logits, **output)


AutoModelForSequenceClassification.register(TrimodalConfig, TrimodalForSequenceClassification, exist_ok=True)
