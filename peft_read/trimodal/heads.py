"""Trimodal models that classify: a whole sample, every frame, or which of several texts fits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.generic import can_return_tuple

from .configuration import TrimodalConfig
from .inputs import TrimodalInputs
from .losses import classification_loss
from .modeling import TrimodalModel, TrimodalOutput


class TrimodalForSequenceClassification(TrimodalModel):
    """A trimodal model that answers with a label, several labels, or numbers.

    `config.problem_type` is as everywhere in transformers: `"single_label_classification"`,
    `"multi_label_classification"` or `"regression"`; told from `num_labels` and the labels' type if it isn't set.
    """

    new_parts = ("fusion", "classifier")

    def _add_parts(self) -> None:
        super()._add_parts()
        self.classifier = nn.Linear(self.config.projection_dim, self.config.num_labels or 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        frame_times: Tensor | None = None,
        frame_features: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        audio_times: Tensor | None = None,
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
        inputs = TrimodalInputs(
            pixel_values=pixel_values,
            frame_mask=frame_mask,
            frame_times=frame_times,
            frame_features=frame_features,
            input_values=input_values,
            input_features=input_features,
            audio_mask=audio_mask,
            audio_times=audio_times,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
        )
        encoded = self._encode(inputs, output_hidden_states, output_attentions)
        fused = self._fuse(encoded)
        logits = self.classifier(fused)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return self._output(encoded, loss=loss, logits=logits, pooler_output=fused)


class TrimodalForFrameClassification(TrimodalModel):
    """A trimodal model that gives every frame a label, several labels, or a number such as its saliency.

    A frame's vector takes the place of the video's mean in the fusion; its logits are made of that. Both frames of a
    tubelet have its vector. `config.problem_type` is as in [`TrimodalForSequenceClassification`].
    """

    needed = ("vision",)
    new_parts = ("fusion", "classifier")

    def _add_parts(self) -> None:
        if self.vision_model is None:
            raise ValueError("A TrimodalForFrameClassification needs a vision tower: give it `vision`.")
        super()._add_parts()
        self.classifier = nn.Linear(self.config.projection_dim, self.config.num_labels or 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        frame_times: Tensor | None = None,
        frame_features: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        audio_times: Tensor | None = None,
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
            ValueError: if there are neither `pixel_values` nor `frame_features`.
        """
        inputs = TrimodalInputs(
            pixel_values=pixel_values,
            frame_mask=frame_mask,
            frame_times=frame_times,
            frame_features=frame_features,
            input_values=input_values,
            input_features=input_features,
            audio_mask=audio_mask,
            audio_times=audio_times,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
        )
        pictures = frame_features if pixel_values is None else pixel_values
        if pictures is None:
            raise ValueError("There are no frames to classify: give `pixel_values`.")
        encoded = self._encode(inputs, output_hidden_states, output_attentions)
        logits = self.classifier(self._fuse_frames(encoded, pictures.shape[1]))
        mask = encoded.batch.towers["vision"].mask
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type, mask)
        return self._output(encoded, loss=loss, logits=logits, pooler_output=self._fuse(encoded))


class TrimodalForMultipleChoice(TrimodalModel):
    """A trimodal model that tells which of several texts, such as answers to a question, fits a clip.

    The choices are an axis of the text. Each meets the clip's pictures and sound by itself, so that the towers for
    these run once for each choice.
    """

    needed = ("text",)
    new_parts = ("fusion", "classifier")

    def _add_parts(self) -> None:
        if self.text_model is None:
            raise ValueError("A TrimodalForMultipleChoice needs a text tower: give it `text`.")
        super()._add_parts()
        self.classifier = nn.Linear(self.config.projection_dim, 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        frame_times: Tensor | None = None,
        frame_features: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        audio_times: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        labels: Tensor | None = None,
    ) -> TrimodalOutput:
        """As in [`TrimodalModel`], with `logits (batch, choices)`, and with a loss where `labels` are given.

        `input_ids` and `attention_mask` are `(batch, choices, words)`, `inputs_embeds (batch, choices, words, dim)`. A
        choice that a sample doesn't have is all 0 in the mask, and its logit is minus infinity. Labels are `(batch,)`,
        the index of the choice that fits, where -100 counts for nothing. Rows of the towers' outputs are
        choices, `batch * choices`. All other inputs are those of [`TrimodalModel`].

        Raises:
            ValueError: if the text has no axis of choices.
        """
        text = inputs_embeds if input_ids is None else input_ids
        if text is None or text.ndim != (4 if input_ids is None else 3):
            raise ValueError(
                "Give the choices as an axis of the text, `input_ids (batch, choices, words)`, got "
                f"{'none' if text is None else tuple(text.shape)}."
            )
        choices = text.shape[1]
        if attention_mask is not None and attention_mask.shape != text.shape[:3]:
            raise ValueError(
                f"`attention_mask` must be (batch, choices, words) = {tuple(text.shape[:3])}, got "
                f"{tuple(attention_mask.shape)}."
            )
        inputs = TrimodalInputs(
            pixel_values=pixel_values,
            frame_mask=frame_mask,
            frame_times=frame_times,
            frame_features=frame_features,
            input_values=input_values,
            input_features=input_features,
            audio_mask=audio_mask,
            audio_times=audio_times,
            input_ids=None if input_ids is None else input_ids.flatten(0, 1),
            attention_mask=None if attention_mask is None else attention_mask.flatten(0, 1),
            inputs_embeds=None if inputs_embeds is None else inputs_embeds.flatten(0, 1),
        ).repeated(choices)
        encoded = self._encode(inputs, output_hidden_states, output_attentions)
        fused = self._fuse(encoded)
        logits = self.classifier(fused).view(-1, choices)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask.bool().any(2), -torch.inf)
        loss = None if labels is None else classification_loss(logits, labels, "single_label_classification")
        return self._output(encoded, loss=loss, logits=logits, pooler_output=fused)


AutoModelForSequenceClassification.register(TrimodalConfig, TrimodalForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(TrimodalConfig, TrimodalForFrameClassification, exist_ok=True)
AutoModelForMultipleChoice.register(TrimodalConfig, TrimodalForMultipleChoice, exist_ok=True)
