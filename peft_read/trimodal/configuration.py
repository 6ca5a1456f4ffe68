"""Configuration of the trimodal model: those of its towers, and of what joins them."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..lockstep.composite import MODALITIES


@strict
class TrimodalConfig(PreTrainedConfig):
    """Configuration of a [`TrimodalModel`]; usually made by `TrimodalModel.from_pretrained_towers`.

    Args:
        vision_config: configuration of the vision tower, as an object or a dict with its `model_type`; None for none.
            The first of its `architectures` names the tower's class where that isn't `AutoModel`'s choice.
        audio_config: the same for the audio tower.
        text_config: the same for the text tower.
        projection_dim: size of the fused vector.
        initializer_range: standard deviation of the initial weights of what joins the towers.
        num_labels, problem_type, ...: as in every configuration of transformers, for the models with heads.
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
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            value = getattr(self, name)
            if isinstance(value, dict):
                if "model_type" not in value:
                    raise ValueError(f"`{name}` has to say its `model_type`, got only {sorted(value)}.")
                setattr(self, name, AutoConfig.for_model(**value))
        super().__post_init__(**kwargs)

    def tower_configs(self) -> dict[str, PreTrainedConfig]:
        """By modality, the configurations of the towers that there are."""
        return {m: config for m in MODALITIES if (config := getattr(self, f"{m}_config")) is not None}
