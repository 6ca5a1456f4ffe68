"""Features from disk in the place of a tower, as most audio-visual benchmarks come."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


MAIN_INPUT = {"vision": "frame_features", "audio": "input_features", "text": "inputs_embeds"}


@strict
class FeatureTowerConfig(PreTrainedConfig):
    """Configuration of a [`FeatureTower`].

    Args:
        modality: of what the features are: `"vision"`, `"audio"` or `"text"`.
        feature_size: size of a feature vector.
        hidden_size: size of the states that are made of it; that of the features by default.
        num_hidden_layers: how often the features can meet the other towers.

    Raises:
        ValueError: if the modality isn't one of those, or a size isn't positive.
    """

    model_type = "peft_read_features"

    modality: str = "vision"
    feature_size: int = 512
    hidden_size: int | None = None
    num_hidden_layers: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.modality not in MAIN_INPUT:
            raise ValueError(f"`modality` must be 'vision', 'audio' or 'text', got {self.modality!r}.")
        self.hidden_size = self.hidden_size or self.feature_size
        for name in ("feature_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        super().__post_init__(**kwargs)


class FeatureBlock(nn.Module):
    """Gives what it gets: where LSTTA sits in a tower that has no blocks."""

    def forward(self, hidden: Tensor) -> Tensor:
        """The same `hidden`."""
        return hidden


class FeatureTower(PreTrainedModel):
    """Stands for a tower whose outputs were computed before: takes them, and gives them to the others.

    Features go through a linear projection, which starts as the identity, or at random where `hidden_size` differs
    from `feature_size` (then name `"projector"` in `modules_to_save`), and from there through `num_hidden_layers`
    places at which LSTTA can sit. They are what a [`TrimodalModel`] takes as `frame_features`, `input_features` or
    `inputs_embeds`, with the mask and the times of their modality.

    ```python
    tower = FeatureTower.of("vision", 1024)
    model = TrimodalModel.from_pretrained_towers(vision=tower, text="google-bert/bert-base-uncased")
    model(frame_features=features, frame_mask=mask, input_ids=input_ids)
    ```
    """

    config_class = FeatureTowerConfig
    config: FeatureTowerConfig
    base_model_prefix = "features"

    def __init__(self, config: FeatureTowerConfig) -> None:
        super().__init__(config)
        assert config.hidden_size is not None
        self.main_input_name = MAIN_INPUT[config.modality]
        self.projector = nn.Linear(config.feature_size, config.hidden_size)
        self.blocks = nn.ModuleList(FeatureBlock() for _ in range(config.num_hidden_layers))
        self.post_init()

    @classmethod
    def of(cls, modality: str, feature_size: int, **options: Any) -> FeatureTower:
        """A tower for features of a size.

        Args:
            modality: `"vision"`, `"audio"` or `"text"`.
            feature_size: size of a feature vector.
            options: other fields of [`FeatureTowerConfig`].
        """
        return cls(FeatureTowerConfig(modality=modality, feature_size=feature_size, **options)).eval()

    @property
    def meeting_blocks(self) -> list[str]:
        """Names of the places at which other towers are met."""
        return [f"blocks.{index}" for index in range(len(self.blocks))]

    @property
    def new_parts(self) -> tuple[str, ...]:
        """What starts from random weights."""
        return () if self.config.hidden_size == self.config.feature_size else ("projector",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if module.in_features == module.out_features:
                nn.init.eye_(module.weight)
            else:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        frame_features: Tensor | None = None,
        input_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Give the features.

        Args:
            frame_features: `(batch, frames, feature_size)`, of a tower for vision.
            input_features: `(batch, steps, feature_size)`, of a tower for sound.
            inputs_embeds: `(batch, words, feature_size)`, of a tower for text.
            attention_mask: `(batch, steps)`, 1 where real; what isn't may hold anything.
            output_hidden_states: whether the output has the states before and after each place.
            output_attentions: there are none.
            return_dict: the output is always an object.

        Raises:
            ValueError: if the features of its modality are missing, or have another shape.
        """
        given = {"frame_features": frame_features, "input_features": input_features, "inputs_embeds": inputs_embeds}
        features = given[self.main_input_name]
        if features is None or features.ndim != 3 or features.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"A FeatureTower for {self.config.modality} takes `{self.main_input_name}` (batch, steps, "
                f"{self.config.feature_size}), got {None if features is None else tuple(features.shape)}."
            )
        if attention_mask is not None:
            features = features.masked_fill(~attention_mask.bool()[..., None], 0.0)
        hidden = self.projector(features)
        states = [hidden]
        for block in self.blocks:
            hidden = block(hidden)
            states.append(hidden)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None)


AutoConfig.register(FeatureTowerConfig.model_type, FeatureTowerConfig, exist_ok=True)
AutoModel.register(FeatureTowerConfig, FeatureTower, exist_ok=True)
