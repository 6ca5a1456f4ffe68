"""A trimodal model that finds clips by sentences: both apart, in one space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from .inputs import TrimodalInputs
from .modeling import Encoded, TrimodalModel, TrimodalOutput
from .towers import tower_inputs


class Similarity(nn.Module):
    """Cosines, scaled: the factor is learnt in logarithms, starts at 1 / 0.07 and stays below 100, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        # One number in a vector: FSDP2 refuses parameters without an axis.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def forward(self, sentences: Tensor, clips: Tensor) -> Tensor:
        """`(sentences, clips)` of normalised embeddings `(n, dim)`."""
        return sentences @ clips.T * self.logit_scale.exp().clamp(max=100.0)


class TrimodalForRetrieval(TrimodalModel):
    """A trimodal model that embeds clips and sentences apart, and learns which belong together.

    Pictures and sound of a clip meet in lockstep once LSTTA joins them; a sentence runs through its tower by itself,
    which LSTTA leaves as it is: else a clip's embedding would depend on what is asked. With pictures or sound alone
    there is nothing to meet, and LSTTA refuses. Name `"fusion"` and `"similarity"` in `modules_to_save`.
    """

    meeting = ("vision", "audio")
    new_parts = ("fusion", "similarity")

    def _add_parts(self) -> None:
        if self.text_model is None:
            raise ValueError("A TrimodalForRetrieval needs a text tower: give it `text`.")
        super()._add_parts()
        self.similarity = Similarity()

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
        return_loss: bool = True,
    ) -> TrimodalOutput:
        """As in [`TrimodalModel`], with `logits (sentences, clips)`, whose diagonal are the pairs of the batch.

        With `return_loss` there is a loss, the mean cross-entropy of finding each sentence's clip among those of the
        batch, and each clip's sentence; in training on several devices each has its own batch. Clips and sentences are
        in the same order. All inputs are those of [`TrimodalModel`].

        Raises:
            ValueError: if clips or sentences are missing, or there are more of one than of the other.
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
        clips = self._encode(inputs.only(("vision", "audio")), output_hidden_states, output_attentions)
        sentences = self._read(inputs.only(("text",)), output_hidden_states, output_attentions)
        if clips.batch.size != sentences.batch.size:
            raise ValueError(
                f"Give a sentence for each clip, got {clips.batch.size} clips and {sentences.batch.size} sentences; "
                "`get_clip_features` and `get_text_features` embed them apart."
            )
        clip, sentence = (F.normalize(self._fuse(each), dim=-1) for each in (clips, sentences))
        logits = self.similarity(sentence, clip)
        loss = None
        if return_loss:
            pairs = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits.float(), pairs) + F.cross_entropy(logits.float().T, pairs)) / 2
        encoded = Encoded(clips.outputs | sentences.outputs, clips.batch)
        return self._output(encoded, loss=loss, logits=logits)

    def get_clip_features(
        self,
        pixel_values: Tensor | None = None,
        frame_mask: Tensor | None = None,
        frame_times: Tensor | None = None,
        frame_features: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        audio_times: Tensor | None = None,
    ) -> Tensor:
        """Embed clips: `(batch, projection_dim)`, of length 1. Arguments are as in [`TrimodalModel`]."""
        inputs = TrimodalInputs(
            pixel_values=pixel_values,
            frame_mask=frame_mask,
            frame_times=frame_times,
            frame_features=frame_features,
            input_values=input_values,
            input_features=input_features,
            audio_mask=audio_mask,
            audio_times=audio_times,
        )
        return F.normalize(self._fuse(self._encode(inputs)), dim=-1)

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed sentences: `(batch, projection_dim)`, of length 1. Arguments are as in [`TrimodalModel`]."""
        inputs = TrimodalInputs(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        return F.normalize(self._fuse(self._read(inputs)), dim=-1)

    def _read(
        self,
        inputs: TrimodalInputs,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Encoded:
        """Run the text tower by itself."""
        values, batch = inputs.described(self.towers())
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        options = {name: value for name, value in asked.items() if value}
        tower = self.towers()["text"]
        arguments = tower_inputs(tower, values["text"], batch.towers["text"].mask)
        return Encoded({"text": tower(**arguments, **options, return_dict=True)}, batch)
