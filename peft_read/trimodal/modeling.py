"""A model that sees, hears and reads: three pretrained towers side by side, in lockstep once adapters join them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput, can_return_tuple

from ..architectures.blocks import find_blocks
from ..lockstep.batch import LockstepBatch
from ..lockstep.composite import MODALITIES, Exchange, run_towers
from .configuration import TrimodalConfig
from .fusion import ModalityFusion, masked_mean
from .inputs import TrimodalInputs, drop_modalities
from .loading import build_tower, load_tower, note_class
from .towers import tokens_of, tower_inputs, tower_width, without_layerdrop


@dataclass
class TrimodalOutput(ModelOutput):
    """What a [`TrimodalModel`] gives.

    Args:
        loss: of the models with heads, if there were labels.
        logits: of the models with heads; see there.
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


class Encoded(NamedTuple):
    """By modality, what the towers gave, and the batch that ran through them."""

    outputs: dict[str, Any]
    batch: LockstepBatch


class TrimodalModel(PreTrainedModel):
    """Two or three pretrained encoders, of pictures, sound and text, and one vector of what they found.

    The towers are `vision_model`, `audio_model` and `text_model`, None where there is none. Each tower is mean-pooled
    over its valid tokens, unless `config.pooling` weighs frames by their importance; the means, normalised and
    projected, are averaged over the modalities that a sample has.

    Args:
        config: configuration of all; its tower configurations say how to build the towers that aren't given.
        vision_model: a vision tower to use as it is; its configuration takes the place of `config.vision_config`.
        audio_model: the same for sound.
        text_model: the same for text.

    Raises:
        ValueError: if there is only one tower, or one that can't be.
    """

    # Modalities that a sample keeps when others are dropped in training.
    needed: ClassVar[tuple[str, ...]] = ()
    # Modalities whose towers run in lockstep; others run by themselves, without adapters.
    meeting: ClassVar[tuple[str, ...]] = MODALITIES
    # Parts that start from random weights, by their names.
    new_parts: ClassVar[tuple[str, ...]] = ("fusion",)
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
                tower = self._build(modality, tower_config)
            elif tower is not None:
                _keep_weights(tower)
            if tower is not None:
                note_class(tower)
                setattr(config, f"{modality}_config", tower.config)
            self._put(modality, tower)
        towers = self.towers()
        if len(towers) < 2:
            raise ValueError(
                f"A {type(self).__name__} joins at least two towers, got {list(towers) or 'none'}: give two or three "
                "of `vision`, `audio` and `text`."
            )
        for modality, tower in towers.items():
            without_layerdrop(modality, tower)
        self._add_parts()
        self.post_init()

    def _add_parts(self) -> None:
        """Make what joins the towers, and in a subclass its head, before weights are initialised."""
        widths = {m: tower_width(tower) for m, tower in self.towers().items()}
        self.fusion = ModalityFusion(widths, self.config.projection_dim)

    def _put(self, modality: str, tower: PreTrainedModel | None) -> None:
        """Make a model the tower for a modality."""
        setattr(self, f"{modality}_model", tower)

    @classmethod
    def _build(cls, modality: str, config: PreTrainedConfig) -> PreTrainedModel:
        """A tower with random weights."""
        return build_tower(config)

    @classmethod
    def _load(cls, modality: str, source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """A pretrained tower."""
        return load_tower(modality, source, **kwargs)

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

        Of a composite (CLIP, SigLIP, CLAP, LLaVA, BLIP, Qwen2-Audio) the side for the modality is taken, of an
        encoder-decoder (Whisper, T5) the encoder. All weights of a tower are the checkpoint's, or there is an error.
        A model that is given is used, not copied.

        Args:
            vision: id of a model on the Hub, path of a folder, or a model; None for none.
            audio: the same for sound.
            text: the same for text.
            dtype: to load towers in, as in `from_pretrained`; what is new has that of the first tower.
            attn_implementation: to load towers with, as in `from_pretrained`.
            config_kwargs: fields of [`TrimodalConfig`], such as `num_labels` or `pooling`.

        Raises:
            ValueError: if there is only one tower, a model has no side for the modality, or weights are missing.
        """
        kwargs = {"dtype": dtype, "attn_implementation": attn_implementation}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        sources = dict(zip(MODALITIES, (vision, audio, text), strict=True))
        towers = {m: cls._load(m, source, **kwargs) for m, source in sources.items() if source is not None}
        model = cls(TrimodalConfig(**config_kwargs), **{f"{m}_model": tower for m, tower in towers.items()})
        first = next(iter(towers.values()))
        for name in cls.new_parts:
            model.get_submodule(name).to(dtype=first.dtype, device=first.device)
        model.config.dtype = first.dtype
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load what `save_pretrained` saved, as in `PreTrainedModel`; only a head may be new.

        Raises:
            ValueError: if the checkpoint lacks weights of a tower.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, report = loaded
        missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] not in cls.new_parts)
        if missing:
            raise ValueError(
                f"{model.name_or_path} lacks {len(missing)} weights of the towers ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}), which would be random. It was saved from another kind of "
                f"model than {cls.__name__}, or incompletely."
            )
        return (model, report) if output_loading_info else model

    def towers(self) -> dict[str, PreTrainedModel]:
        """By modality, the towers that there are."""
        return {m: tower for m in MODALITIES if (tower := getattr(self, f"{m}_model")) is not None}

    def pretrained_parts(self) -> dict[str, PreTrainedModel]:
        """By modality, what `from_pretrained_towers` was given, or the tower of it."""
        return self.towers()

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
    ) -> TrimodalOutput:
        """Run the towers and fuse what they found. A modality may be left out.

        Args:
            pixel_values: `(batch, frames, channels, height, width)`.
            frame_mask: `(batch, frames)`, 1 where a frame is real; all are by default.
            frame_times: `(batch, frames, 2)`, from when to when each frame is shown, in seconds, rising. Given
                together with `audio_times`, pictures and sound meet at the same second; without both, they are taken
                to begin and to end together.
            frame_features: `(batch, frames, dim)`, in place of `pixel_values`, for a [`FeatureTower`].
            input_values: sound as the audio tower takes it, if under this name: a waveform `(batch, samples)`, or a
                spectrogram `(batch, time, bins)`. Sound in segments, which follow each other in time and which the
                tower hears one by one, has them after the batch: `(batch, segments, ...)`.
            input_features: sound as the audio tower takes it, if under this name.
            audio_mask: `(batch, steps)` or `(batch, segments, steps)`, 1 where sound is real; steps are samples, or
                frames of the spectrogram. All 0 for a sample without sound.
            audio_times: `(batch, 2)` or `(batch, segments, 2)`, in seconds: when the first step begins, and how long a
                step lasts.
            input_ids: `(batch, words)`.
            attention_mask: `(batch, words)`, 1 where a token is real.
            inputs_embeds: `(batch, words, dim)`, in place of `input_ids`.
            output_hidden_states: whether the towers' outputs have all hidden states.
            output_attentions: whether the towers' outputs have attention weights.

        Raises:
            ValueError: if inputs don't fit each other or the towers, or there are none.
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
        return self._output(encoded, pooler_output=self._fuse(encoded))

    def _encode(
        self, inputs: TrimodalInputs, output_hidden_states: bool | None = None, output_attentions: bool | None = None
    ) -> Encoded:
        """Run the towers."""
        values, batch = inputs.described(self.towers())
        if self.training and self.config.modality_dropout:
            drop_modalities(batch, self.config.modality_dropout, self.needed)
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        options = {name: value for name, value in asked.items() if value}
        calls = {}
        for modality, value in values.items():
            tower, mask = self.towers()[modality], batch.towers[modality].mask
            if mask is not None and mask.ndim == 3:
                mask = mask.flatten(0, 1)
            calls[modality] = partial(tower, **tower_inputs(tower, value, mask), **options, return_dict=True)
        return Encoded(run_towers(self, calls, batch), batch)

    def _output(self, encoded: Encoded, **values: Any) -> TrimodalOutput:
        """The model's output, with those of the towers."""
        return TrimodalOutput(**values, **{f"{m}_model_output": out for m, out in encoded.outputs.items()})

    def _fuse(self, encoded: Encoded) -> Tensor:
        """The fused vector, `(batch, projection_dim)`."""
        vectors, present = self._pool(encoded)
        fused: Tensor = self.fusion(vectors, present)
        return fused

    def _fuse_frames(self, encoded: Encoded, frames: int) -> Tensor:
        """A fused vector for each frame in the place of the pictures', `(batch, frames, projection_dim)`."""
        pooled, there = self._pool(encoded)
        vectors = {m: vector[:, None] for m, vector in pooled.items()}
        present = {m: None if each is None else each[:, None] for m, each in there.items()}
        steps, _ = self._over_time("vision", encoded)
        place = torch.arange(frames, device=steps.device) * steps.shape[1] // frames
        # Each frame has the vector of the time step that it is in.
        vectors["vision"], present["vision"] = steps[:, place], encoded.batch.towers["vision"].mask
        fused: Tensor = self.fusion(vectors, present)
        return fused

    def _pool(self, encoded: Encoded) -> tuple[dict[str, Tensor], Mapping[str, Tensor | None]]:
        """By modality, the mean `(batch, dim)` of what is real in a tower's output, and whether anything is."""
        vectors, present = {}, {}
        for modality in encoded.outputs:
            values, mask = self._over_time(modality, encoded)
            by_importance = self.config.pooling == "importance"
            weights = encoded.batch.importance.get(modality) if by_importance else None
            if weights is not None and weights.shape != values.shape[:2]:
                weights = None  # a tower that joins steps after its last block
            vectors[modality] = masked_mean(values, mask, weights)
            present[modality] = None if mask is None else mask.any(1)
        return vectors, present

    def _over_time(self, modality: str, encoded: Encoded) -> tuple[Tensor, Tensor | None]:
        """`(batch, time, dim)` of a tower's output, and `(batch, time)`, where it is real; text has its words."""
        part = encoded.batch.towers[modality]
        timed, untimed = part.split(tokens_of(self.towers()[modality], encoded.outputs[modality]))
        timed_mask, untimed_mask = part.masks(timed, untimed)
        if timed is not None:
            return timed.mean(2), timed_mask
        assert untimed is not None
        return untimed, untimed_mask

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
