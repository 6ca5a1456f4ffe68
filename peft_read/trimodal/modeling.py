"""A model that sees, hears and reads: three pretrained towers side by side, in lockstep once adapters join them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput, can_return_tuple

from ..architectures.blocks import find_blocks
from ..lockstep.composite import MODALITIES, Exchange, LockstepBatch, TowerBatch, run_towers
from .configuration import TrimodalConfig
from .fusion import ModalityFusion, masked_mean
from .towers import build_tower, load_tower, sound_steps, tokens_of, tower_inputs, tower_width, without_layerdrop


@dataclass
class TrimodalOutput(ModelOutput):
    """What a [`TrimodalModel`] gives.

    Args:
        loss: of the models with heads, if there were labels.
        logits: of the models with heads; `(batch, labels)`, or `(batch, frames, labels)`.
        pooler_output: `(batch, projection_dim)`, the fused vector.
        vision_model_output: the vision tower's own output object; rows of image towers are frames, `batch * frames`.
        audio_model_output: the audio tower's.
        text_model_output: the text tower's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    vision_model_output: ModelOutput | None = None
    audio_model_output: ModelOutput | None = None
    text_model_output: ModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All that isn't None, the towers' outputs as tuples as well."""
        return tuple(
            value.to_tuple() if isinstance(value, ModelOutput) else value
            for value in self.values()
            if value is not None
        )


class TrimodalModel(PreTrainedModel):
    """Two or three pretrained encoders, of pictures, sound and text, and one vector of what they found.

    The towers are `vision_model`, `audio_model` and `text_model`, None where there is none. Each tower is mean-pooled
    over its valid tokens; the means, normalised and projected, are averaged over the modalities that a sample has.

    Args:
        config: configuration of all; its tower configurations say how to build the towers that aren't given.
        vision_model: a vision tower to use as it is; its configuration takes the place of `config.vision_config`.
        audio_model: the same for sound.
        text_model: the same for text.

    Raises:
        ValueError: if there is only one tower.
    """

    config_class = TrimodalConfig
    config: TrimodalConfig
    base_model_prefix = "trimodal"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # Set by a tuner that lets the towers exchange, see `run_towers`.
    make_exchange: Callable[[LockstepBatch], Exchange] | None = None

    def __init__(
        self,
        config: TrimodalConfig,
        vision_model: PreTrainedModel | None = None,
        audio_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        given = dict(zip(MODALITIES, (vision_model, audio_model, text_model), strict=True))
        for modality, tower in given.items():
            if tower is None and (tower_config := getattr(config, f"{modality}_config")) is not None:
                tower = build_tower(tower_config)
            elif tower is not None:
                _keep_weights(tower)
            if tower is not None:
                without_layerdrop(modality, tower)
                tower.config.architectures = [type(tower).__name__]
                setattr(config, f"{modality}_config", tower.config)
            setattr(self, f"{modality}_model", tower)
        towers = self.towers()
        if len(towers) < 2:
            raise ValueError(
                f"A {type(self).__name__} joins at least two towers, got {list(towers) or 'none'}: give two or three "
                "of `vision`, `audio` and `text`."
            )
        self.fusion = ModalityFusion({m: tower_width(tower) for m, tower in towers.items()}, config.projection_dim)
        self._add_head()
        self.post_init()

    def _add_head(self) -> None:
        """Where a subclass makes its head, before weights are initialised."""

    @classmethod
    def from_pretrained_towers(
        cls,
        vision: str | PreTrainedModel | None = None,
        audio: str | PreTrainedModel | None = None,
        text: str | PreTrainedModel | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        **config_kwargs: Any,
    ) -> Self:
        """Join pretrained encoders, any two or all three; what joins them, and a head, starts from random weights.

        Of a dual encoder (CLIP, SigLIP, CLAP) the side for the modality is taken, of an encoder-decoder (Whisper, T5)
        the encoder. A model that is given is used, not copied.

        Args:
            vision: id of a model on the Hub, path of a folder, or a model; None for none.
            audio: the same for sound.
            text: the same for text.
            dtype: to load towers in, as in `from_pretrained`; what is new has that of the first tower.
            attn_implementation: to load towers with, as in `from_pretrained`.
            config_kwargs: fields of [`TrimodalConfig`], such as `num_labels`.

        Raises:
            ValueError: if there is only one tower.
        """
        kwargs = {"dtype": dtype, "attn_implementation": attn_implementation}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        sources = dict(zip(MODALITIES, (vision, audio, text), strict=True))
        towers = {m: load_tower(m, source, **kwargs) for m, source in sources.items() if source is not None}
        model = cls(TrimodalConfig(**config_kwargs), **{f"{m}_model": tower for m, tower in towers.items()})
        first = next(iter(towers.values()))
        for name, module in model.named_children():
            if not name.endswith("_model"):
                module.to(dtype=first.dtype, device=first.device)
        model.config.dtype = first.dtype
        return model.eval()

    def towers(self) -> dict[str, PreTrainedModel]:
        """By modality, the towers that there are."""
        return {m: tower for m in MODALITIES if (tower := getattr(self, f"{m}_model")) is not None}

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
    ) -> TrimodalOutput:
        """Run the towers and fuse what they found. A modality may be left out.

        Args:
            pixel_values: `(batch, frames, channels, height, width)`.
            frame_mask: `(batch, frames)`, 1 where a frame is real; all are by default.
            input_values: sound as the audio tower takes it, if under this name: a waveform `(batch, samples)`, or a
                spectrogram `(batch, time, bins)`.
            input_features: sound as the audio tower takes it, if under this name.
            audio_mask: `(batch, steps)`, 1 where sound is real; steps are samples, or frames of the spectrogram. All
                0 for a sample without sound.
            input_ids: `(batch, words)`.
            attention_mask: `(batch, words)`, 1 where a token is real.
            inputs_embeds: `(batch, words, dim)`, in place of `input_ids`.
            output_hidden_states: whether the towers' outputs have all hidden states.
            output_attentions: whether the towers' outputs have attention weights.

        Raises:
            ValueError: if inputs don't fit each other or the towers, or there are none.
        """
        batch = self._batch(
            {"pixel_values": pixel_values},
            {"input_values": input_values, "input_features": input_features},
            {"input_ids": input_ids, "inputs_embeds": inputs_embeds},
            {"vision": frame_mask, "audio": audio_mask, "text": attention_mask},
        )
        return self._encode(batch, output_hidden_states, output_attentions)[0]

    def _batch(
        self,
        vision: dict[str, Tensor | None],
        audio: dict[str, Tensor | None],
        text: dict[str, Tensor | None],
        masks: dict[str, Tensor | None],
    ) -> tuple[dict[str, Tensor], LockstepBatch]:
        """By modality, the inputs that there are, and their description, checked."""
        inputs = {}
        for modality, names in zip(MODALITIES, (vision, audio, text), strict=True):
            given = {name: value for name, value in names.items() if value is not None}
            tower = self.towers().get(modality)
            if not given:
                if masks[modality] is not None:
                    raise ValueError(f"There is a mask for the {modality} tower, but no input.")
                continue
            if tower is None:
                raise ValueError(f"This model has no {modality} tower, but was given {list(given)}.")
            if len(given) > 1:
                raise ValueError(f"Give either of {list(given)}, not both.")
            ((name, value),) = given.items()
            if modality == "audio" and name != tower.main_input_name:
                raise ValueError(f"A {type(tower).__name__} takes `{tower.main_input_name}`, not `{name}`.")
            if modality == "vision" and value.ndim != 5:
                raise ValueError(
                    f"`pixel_values` must be (batch, frames, channels, height, width), got shape {tuple(value.shape)}."
                )
            inputs[modality] = value
        sizes = {modality: len(value) for modality, value in inputs.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"Give pictures, sound or text, of the same number of samples; got {sizes or 'nothing'}.")
        batch = LockstepBatch(next(iter(sizes.values())), {})
        for modality, value in inputs.items():
            tower = self.towers()[modality]
            steps = sound_steps(tower, value) if modality == "audio" else value.shape[1]
            batch.towers[modality] = TowerBatch.of(modality, tower, batch.size, steps, masks[modality])
        return inputs, batch

    def _encode(
        self,
        described: tuple[dict[str, Tensor], LockstepBatch],
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        frames: bool = False,
    ) -> tuple[TrimodalOutput, Tensor]:
        """What a [`TrimodalModel`] gives, and the vectors for a head: those of frames, or the fused one again."""
        inputs, batch = described
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        options = {name: value for name, value in asked.items() if value}
        calls = {}
        for modality, value in inputs.items():
            tower = self.towers()[modality]
            arguments = tower_inputs(tower, value, batch.towers[modality].mask)
            calls[modality] = partial(tower, **arguments, **options, return_dict=True)
        outputs = run_towers(self, calls, batch)
        vectors, present = self._pool(outputs, batch)
        fused = self.fusion(vectors, present)
        output = TrimodalOutput(pooler_output=fused, **{f"{m}_model_output": out for m, out in outputs.items()})
        if not frames:
            return output, fused
        vectors = {m: vector[:, None] for m, vector in vectors.items()}
        present = {m: None if there is None else there[:, None] for m, there in present.items()}
        vectors["vision"], present["vision"] = self._frames(outputs["vision"], batch, inputs["vision"].shape[1])
        return output, self.fusion(vectors, present)

    def _pool(
        self, outputs: dict[str, Any], batch: LockstepBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """By modality, the mean `(batch, dim)` of what is real in a tower's output, and whether anything is."""
        vectors, present = {}, {}
        for modality, output in outputs.items():
            values, mask = self._over_time(modality, output, batch)
            vectors[modality] = masked_mean(values, mask)
            present[modality] = None if mask is None else mask.any(1)
        return vectors, present

    def _over_time(self, modality: str, output: Any, batch: LockstepBatch) -> tuple[Tensor, Tensor | None]:
        """`(batch, time, dim)` of a tower's output, and `(batch, time)`, where it is real; text has its words."""
        part = batch.towers[modality]
        timed, untimed = part.split(tokens_of(output, tower_width(self.towers()[modality])))
        timed_mask, untimed_mask = part.masks(timed, untimed)
        if timed is not None:
            return timed.mean(2), timed_mask
        assert untimed is not None
        return untimed, untimed_mask

    def _frames(self, output: Any, batch: LockstepBatch, frames: int) -> tuple[Tensor, Tensor | None]:
        """`(batch, frames, dim)`, each frame with the vector of the time step that it is in, and which are real."""
        steps, _ = self._over_time("vision", output, batch)
        place = torch.arange(frames, device=steps.device) * steps.shape[1] // frames
        return steps[:, place], batch.towers["vision"].mask

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's."""
        return self._text_tower().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the text tower's."""
        self._text_tower().set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the text tower's, as in `PreTrainedModel`."""
        return self._text_tower().resize_token_embeddings(*args, **kwargs)

    def _text_tower(self) -> PreTrainedModel:
        if self.text_model is None:
            raise NotImplementedError(f"This {type(self).__name__} has no text tower, so it has no input embeddings.")
        return cast(PreTrainedModel, self.text_model)

    def enable_input_require_grads(self) -> None:
        """Let the hidden states that go into each tower's blocks require gradients, as reentrant checkpoints need."""
        self.disable_input_require_grads()
        self._require_grads_hooks = []
        for tower in self.towers().values():
            with suppress(ValueError):  # a tower without such blocks has no checkpoints around them
                first = _first_checkpoint(tower, find_blocks(tower)[0])
                self._require_grads_hooks.append(first.register_forward_pre_hook(_require_gradients))


def _keep_weights(tower: nn.Module) -> None:
    """Mark a tower's weights as initialised, also those that transformers doesn't know of."""
    for part in [*tower.modules(), *tower.parameters(), *tower.buffers()]:
        setattr(part, "_is_hf_initialized", True)  # noqa: B010  (not an attribute that torch declares)


def _first_checkpoint(tower: nn.Module, block: str) -> nn.Module:
    """The outermost part around a block that may be checkpointed, such as a stage of Swin, or the block itself."""
    names = accumulate(block.split("."), "{}.{}".format)
    parts = [tower.get_submodule(name) for name in names]
    return next((part for part in parts if isinstance(part, GradientCheckpointingLayer)), parts[-1])


def _require_gradients(block: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled():
        args[0].requires_grad_(True)


AutoConfig.register(TrimodalConfig.model_type, TrimodalConfig, exist_ok=True)
AutoModel.register(TrimodalConfig, TrimodalModel, exist_ok=True)
