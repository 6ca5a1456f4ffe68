"""The fields that READ's and LSTTA's configurations have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from .checks import (
    check_activation,
    check_bool,
    check_dropout,
    check_inner_adapters,
    check_names,
    check_scale,
    check_token_indices,
    is_name_of_module,
    shown,
)


# Of models of this package: by which class of transformers `AutoPeftModel` finds them, which imports no other library.
AUTO_CLASSES = {
    "TrimodalModel": "AutoModel",
    "TrimodalForSequenceClassification": "AutoModelForSequenceClassification",
    "TrimodalForFrameClassification": "AutoModelForTokenClassification",
}


@dataclass
class AdapterConfig(PeftConfig):
    """Common base of `ReadConfig` and `LsttaConfig`, which describe the fields."""

    act_fn: str = field(default="gelu", metadata={"help": "Activation in the bottleneck, a key of ACT2FN."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's output."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved beside the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained beside the adapter."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep tied what is tied to input embeddings that are trained."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model."})
    inner_adapters: dict[str, list[str]] | None = field(
        default=None,
        metadata={"help": "By part of the model, adapters of its own that were saved beside. Set when saving."},
    )
    active_inner_adapters: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Likewise, those of `inner_adapters` that act. Set when saving."}
    )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's saving, with the base model's class as `AutoPeftModel` can load it."""
        mapping = kwargs.get("auto_mapping_dict") or {}
        if str(mapping.get("parent_library")).startswith(f"{__package__.partition('.')[0]}."):
            auto_class = AUTO_CLASSES.get(mapping["base_model_class"], "AutoModel")
            kwargs["auto_mapping_dict"] = {"base_model_class": auto_class, "parent_library": "transformers"}
        super().save_pretrained(save_directory, **kwargs)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inference_mode", "ensure_weight_tying", "init_weights"):
            check_bool(name, getattr(self, name))
        check_activation("act_fn", self.act_fn)
        check_dropout("dropout", self.dropout)
        check_scale("scaling", self.scaling)
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string, got {shown(value)}.")
        if self.modules_to_save is not None and self.modules_to_save != []:
            check_names("modules_to_save", self.modules_to_save)
            wrong = [name for name in self.modules_to_save if not is_name_of_module(name)]
            if wrong:  # PEFT puts them into regular expressions
                raise ValueError(f"`modules_to_save` must be a list of names of modules, got {shown(wrong[0])} in it.")
        for name in ("inner_adapters", "active_inner_adapters"):
            if getattr(self, name) is not None:
                check_inner_adapters(name, getattr(self, name))
        if self.trainable_token_indices is not None:
            check_token_indices("trainable_token_indices", self.trainable_token_indices)
