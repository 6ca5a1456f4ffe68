"""A trimodal model that writes: captions, open answers, summaries, by the decoder of a frozen encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration import TrimodalConfig
from .inputs import TrimodalInputs
from .loading import build_language_model, load_language_model
from .modeling import TrimodalModel, TrimodalOutput


class TrimodalForConditionalGeneration(TrimodalModel, GenerationMixin):
    """A trimodal model whose text tower is the encoder of a T5, a BART or the like, and whose decoder answers.

    The encoder reads a prompt or a question, meets sound and pictures in lockstep once LSTTA joins them, and hands its
    states to the decoder. Without adapters the model writes what the language model alone writes. There is no fused
    vector and nothing that starts at random.

    What the last meeting tells pictures and sound reaches no word: a `DistributedDataParallel` of your own needs
    `find_unused_parameters=True`, as Trainers set it.

    Give the encoder-decoder as `text` to `from_pretrained_towers`; it is the model's `language_model`. `generate` is
    the language model's own, with beams and its cache: the towers run once.
    """

    needed = ("text",)
    new_parts = ()
    # What Trainers and PEFT ask of models that generate.
    main_input_name = "input_ids"

    def __init__(self, config: TrimodalConfig, **towers: PreTrainedModel | None) -> None:
        super().__init__(config, **towers)
        # So that Trainers and PEFT see an encoder-decoder.
        text = self.language_model.config
        self.config.is_encoder_decoder = True
        for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
            setattr(self.config, name, getattr(text, name, None))
        self.generation_config = self.language_model.generation_config

    @property
    def text_model(self) -> PreTrainedModel:
        """The language model's encoder."""
        encoder: PreTrainedModel = self.language_model.get_encoder()
        return encoder

    def _put(self, modality: str, tower: PreTrainedModel | None) -> None:
        if modality != "text":
            super()._put(modality, tower)
            return
        if tower is None:
            raise ValueError(
                "A TrimodalForConditionalGeneration needs an encoder-decoder that reads and writes: give it as `text`."
            )
        self.language_model = load_language_model(tower)

    def _add_parts(self) -> None:
        pass

    def pretrained_parts(self) -> dict[str, PreTrainedModel]:
        """By modality, the towers, and the language model for text."""
        return self.towers() | {"text": self.language_model}

    @classmethod
    def _build(cls, modality: str, config: PreTrainedConfig) -> PreTrainedModel:
        return build_language_model(config) if modality == "text" else super()._build(modality, config)

    @classmethod
    def _load(cls, modality: str, source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return (
            load_language_model(source, **kwargs) if modality == "text" else super()._load(modality, source, **kwargs)
        )

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
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
    ) -> TrimodalOutput:
        """As in [`TrimodalModel`], with `logits (batch, written, vocabulary)`, and a loss where `labels` are given.

        Labels are `(batch, written)`, the tokens to be written, where -100 counts for nothing. `decoder_input_ids
        (batch, written)`, or `decoder_inputs_embeds`, are what the decoder has written so far, made of `labels` by
        default, and `decoder_attention_mask` is 1 where that is real. All other inputs are those of [`TrimodalModel`];
        there has to be some text, such as "describe:".

        Raises:
            ValueError: if there is no text.
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
        encoded = self._encode(self._with_text(inputs), output_hidden_states, output_attentions)
        written = self.language_model(
            **self._for_decoder(encoded),
            labels=labels,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            return_dict=True,
        )
        return self._output(encoded, loss=written.loss, logits=written.logits)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write, as the language model does.

        Args:
            inputs: `input_ids`, where they aren't given by name.
            generation_config: how to write; the model's own by default.
            labels: not looked at; Trainers pass them.
            kwargs: the model's inputs, by their names, and options of the language model's `generate`.

        Returns:
            What the language model's `generate` returns: by default `(batch, written)` token ids.
        """
        names = TrimodalInputs.__dataclass_fields__
        values = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        if inputs is not None:
            values["input_ids"] = inputs
        given = self._with_text(TrimodalInputs(**values))
        encoded = self._encode(given)
        if given.input_ids is not None:  # some options look at what was read, such as `encoder_no_repeat_ngram_size`
            kwargs["input_ids"] = given.input_ids
        generate: Any = self.language_model.generate
        return generate(
            **self._for_decoder(encoded), generation_config=generation_config or self.generation_config, **kwargs
        )

    @staticmethod
    def _with_text(inputs: TrimodalInputs) -> TrimodalInputs:
        if inputs.input_ids is None and inputs.inputs_embeds is None:
            raise ValueError(
                "There is no text to start from: give `input_ids`, a question or a prompt such as 'describe:'."
            )
        return inputs

    def _for_decoder(self, encoded: Any) -> dict[str, Any]:
        """What the language model needs of the encoder."""
        hidden = encoded.outputs["text"].last_hidden_state
        mask = encoded.batch.towers["text"].mask
        if mask is not None:  # as the encoder is given it: a sample without text is one of padding
            mask = (mask | ~mask.any(1, keepdim=True)).long()
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask}

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The language model's encoder, the text tower."""
        return self.text_model

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The language model's decoder."""
        decoder: nn.Module = self.language_model.get_decoder()
        return decoder

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's."""
        head: nn.Module | None = self.language_model.get_output_embeddings()
        return head

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the language model's."""
        self.language_model.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the language model's, as in `PreTrainedModel`."""
        return self.language_model.resize_token_embeddings(*args, **kwargs)


AutoModelForSeq2SeqLM.register(TrimodalConfig, TrimodalForConditionalGeneration, exist_ok=True)
