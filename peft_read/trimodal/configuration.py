"""Configuration of the trimodal model: those of its towers, and of what joins them."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..lockstep.composite import MODALITIES


POOLINGS = ("mean", "importance")


@strict
class TrimodalConfig(PreTrainedConfig):
    """Configuration of a [`TrimodalModel`]; usually made by `TrimodalModel.from_pretrained_towers`.

    Args:
        vision_config: configuration of the vision tower, as an object or a dict with its `model_type`; None for none.
            The first of its `architectures` names the tower's class where that isn't `AutoModel`'s choice.
        audio_config: the same for the audio tower.
        text_config: the same for the text tower.
        projection_dim: size of the fused vector.
        pooling: how the frames of a clip become one vector: `"mean"`, all alike; `"importance"`, by how much each
            counts in the long-term semantic filtering of the last level of LSTTA, which learns from it what matters.
            Without LSTTA, or without its filter, both are the same.
        modality_dropout: probability with which a sample loses a modality in training, each by itself and never all,
            so that one checkpoint serves all combinations.
        initializer_range: standard deviation of the initial weights of what joins the towers.
        num_labels, problem_type, ...: as in every configuration of transformers, for the models with heads.

    Raises:
        ValueError: if a tower's configuration doesn't say its model type, or an option isn't one of those.
    """

    model_type = "trimodal"
    sub_configs = {f"{modality}_config": AutoConfig for modality in MODALITIES}
    has_no_defaults_at_init = True
    # Of what a model gives; predictions are its logits alone.
    keys_to_ignore_at_inference = ["pooler_output", "vision_model_output", "audio_model_output", "text_model_output"]

    vision_config: PreTrainedConfig | dict[str, Any] | None = None
    audio_config: PreTrainedConfig | dict[str, Any] | None = None
    text_config: PreTrainedConfig | dict[str, Any] | None = None
    projection_dim: int = 512
    pooling: str = "mean"
    modality_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            value = getattr(self, name)
            if isinstance(value, dict):
                if "model_type" not in value:
                    raise ValueError(f"`{name}` has to say its `model_type`, got only {sorted(value)}.")
                setattr(self, name, AutoConfig.for_model(**value))
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(map(repr, POOLINGS))}, got {self.pooling!r}.")
        if not 0 <= self.modality_dropout < 1:
            raise ValueError(f"`modality_dropout` must be at least 0 and below 1, got {self.modality_dropout}.")
        super().__post_init__(**kwargs)

    def tower_configs(self) -> dict[str, PreTrainedConfig]:
        """By modality, the configurations of the towers that there are."""
        return {m: config for m in MODALITIES if (config := getattr(self, f"{m}_config")) is not None}
