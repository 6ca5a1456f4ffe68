"""The methods that are compared: what each trains in a frozen text model. The peers are PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peft_read import ReadConfig


VIRTUAL_TOKENS = 16


@dataclass(frozen=True)
class Method:
    """A way to train a frozen model.

    Attributes:
        label: in tables.
        trained: which of the text model's own weights are trained: takes a name and the last block's number.
        config: of the PEFT method beside the frozen model, if there is one.
        generates: whether it works in an encoder-decoder whose encoder is given embeddings.
        pvla: options of the alignment loss, if there is one; the projection of the frames is then trained as well.
    """

    label: str
    trained: Callable[[str, int], bool] | None = None
    config: Callable[[], PeftConfig] | None = None
    generates: bool = True
    pvla: dict[str, Any] | None = None


def _in_last_block(name: str, last: int) -> bool:
    return f".layer.{last}." in name or f".block.{last}." in name


METHODS = {
    "full": Method("full, but for the vocabulary", lambda name, last: True),
    "partial": Method("partial: the last block", _in_last_block),
    "bias": Method("bias (norms' scales in T5)", lambda name, last: name.endswith("bias") or "layer_norm" in name),
    "head": Method("head alone"),
    "lora": Method("LoRA, q and v, r = 8", config=lambda: LoraConfig(r=8, lora_alpha=16)),
    "lora-all": Method(
        "LoRA, all linear, r = 2", config=lambda: LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    ),
    "dora": Method("DoRA, q and v, r = 8", config=lambda: LoraConfig(r=8, lora_alpha=16, use_dora=True)),
    "ia3": Method("IA3", config=lambda: IA3Config()),
    "prompt": Method(
        f"prompt tuning, {VIRTUAL_TOKENS} tokens",
        config=lambda: PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=VIRTUAL_TOKENS),
        generates=False,
    ),
    "prefix": Method(
        f"prefix tuning, {VIRTUAL_TOKENS} tokens",
        config=lambda: PrefixTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=VIRTUAL_TOKENS),
        generates=False,
    ),
    "adapter": Method("bottleneck adapter (READ, cell='none')", config=lambda: ReadConfig(r=16, cell="none")),
    "read-rnn": Method("READ, the paper's tanh RNN", config=lambda: ReadConfig(r=16, cell="rnn")),
    "read-gru": Method("READ, GRU", config=lambda: ReadConfig(r=16, cell="gru")),
    "read-lstm": Method("READ, LSTM", config=lambda: ReadConfig(r=16, cell="lstm")),
    "read-pvla": Method(
        "READ, GRU, and PVLA on the digit's name",
        config=lambda: ReadConfig(r=16, cell="gru"),
        generates=False,  # there is no sentence beside the video
        pvla={"pvla_states": "inputs", "pvla_weight": 10.0},
    ),
}


class PromptedEncoder(nn.Module):
    """A BERT under PEFT's prompt or prefix tuning, called as the bare one is.

    PEFT drops token types and leaves the prompt's states in the output; here the types go into the embeddings, and the
    prompt's states are cut off.
    """

    def __init__(self, model: PeftModel, shown: int) -> None:
        super().__init__()
        self.model = model
        self.shown = shown  # of the virtual tokens, in the output
        self.config = model.config

    def get_input_embeddings(self) -> nn.Module:
        """Those of the words."""
        return self.model.get_base_model().get_input_embeddings()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> BaseModelOutput:
        """The states of the sequence, `(batch, time, size)`."""
        types = self.model.get_base_model().embeddings.token_type_embeddings.weight
        embedded = inputs_embeds + types[token_type_ids] - types[0]
        states = self.model(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=states[:, self.shown :])


def adapt(model: Any, method: str, heads: list[str], fixed: tuple[str, ...] = ("word_embeddings", "shared")) -> int:
    """Freeze a model but for its heads, and train its `text_model` by a method, in place.

    Args:
        model: has a `text_model`.
        method: a key of `METHODS`.
        heads: names of its modules that are trained beside.
        fixed: parts of names of weights that no method trains.

    Returns:
        The number of weights that are trained.
    """
    chosen = METHODS[method]
    model.requires_grad_(False)
    text_model: PreTrainedModel = model.text_model
    if chosen.trained is not None:
        last = text_model.config.num_hidden_layers - 1
        for name, parameter in text_model.named_parameters():
            parameter.requires_grad_(chosen.trained(f".{name}", last) and not any(part in name for part in fixed))
    if chosen.config is not None:
        config = chosen.config()
        adapted = get_peft_model(text_model, config)
        if config.is_prompt_learning:
            shown = VIRTUAL_TOKENS if isinstance(config, PromptTuningConfig) else 0
            model.text_model = PromptedEncoder(adapted, shown)
        else:
            model.text_model = adapted
    for name in (*heads, *(["frame_projection"] if chosen.pvla else [])):
        model.get_submodule(name).requires_grad_(True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
