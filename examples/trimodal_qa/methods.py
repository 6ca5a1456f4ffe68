"""The methods that are compared: what each is given of a clip, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.training import train
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from peft_read import LsttaConfig, TrimodalForFrameClassification

from . import late_fusion
from .inputs import Collator, Example, with_shuffled_sound, without_pictures
from .towers import digit_head, start_from_digits


ALL = ("vision", "audio", "text")
TRAINED = ["fusion", "classifier"]  # beside the adapters
SETTINGS: dict[str, Any] = {"r": 32, "num_heads": 4, "window": 1}


@dataclass(frozen=True)
class Towers:
    """Where the frozen towers are: folders, or ids on the Hub."""

    vision: str
    audio: str
    text: str


@dataclass(frozen=True)
class Training:
    """How a method is trained: at its peak learning rate, for so many steps, from a seed; logs go to a folder."""

    steps: int
    learning_rate: float
    seed: int
    output: str


@dataclass(frozen=True)
class Lstta:
    """LSTTA in frozen towers, and a head on what they find.

    Attributes:
        modalities: what the model is given; without `"vision"` its frames are blank, as it has to answer for frames.
        settings: fields of the LsttaConfig that differ from `SETTINGS`.
        shuffle_sound: whether the sounds of each clip's frames come in another order.
    """

    modalities: Sequence[str] = ALL
    settings: dict[str, Any] = field(default_factory=dict)
    shuffle_sound: bool = False

    @property
    def collator(self) -> Collator:
        """Makes batches of what it is given."""
        return Collator({"vision", *self.modalities})

    def inputs(self, examples: Sequence[Example], seed: int) -> list[Example]:
        """What it is given of examples."""
        given = list(examples) if "vision" in self.modalities else without_pictures(examples)
        return with_shuffled_sound(given, seed) if self.shuffle_sound else given

    def fit(
        self, name: str, towers: Towers, answers: Sequence[str], examples: Sequence[Example], training: Training
    ) -> PeftModel:
        """The adapted model, trained on examples that `inputs` gave."""
        set_seed(training.seed)
        base = load_base(towers, answers, self.modalities)
        config = LsttaConfig(**SETTINGS | self.settings, modules_to_save=TRAINED)
        model = get_peft_model(base, config)
        _train(model, examples, self.collator, name, training)
        return model


@dataclass(frozen=True)
class Late:
    """Frozen towers alone, and a head on what they find.

    Attributes:
        head: the head.
        options: of the head.
    """

    head: type[late_fusion.LateFusion]
    options: dict[str, Any] = field(default_factory=dict)

    def fit(
        self, name: str, towers: Towers, answers: Sequence[str], encoded: Sequence[Example], training: Training
    ) -> late_fusion.LateFusion:
        """The head, trained on what `late_fusion.encode` gave."""
        set_seed(training.seed)
        head = self.head(encoded, len(answers) + 1, digit_head(towers.vision, answers), **self.options)
        _train(head, encoded, late_fusion.collate, name, training)
        return head


METHODS: dict[str, Lstta | Late] = {
    "lstta": Lstta(),
    "vision+sound": Lstta(("vision", "audio")),
    "vision+text": Lstta(("vision", "text")),
    "sound+text": Lstta(("audio", "text")),
    "shuffled-sound": Lstta(shuffle_sound=True),
    "no-filter": Lstta(settings={"frame_filter": False}),
    "one-level": Lstta(settings={"num_levels": 1}),
    "window-4": Lstta(settings={"window": 4}),
    "window-4-no-filter": Lstta(settings={"window": 4, "frame_filter": False}),
    "late-mlp": Late(late_fusion.FrameMlp),
    "late-mlp-pooled-sound": Late(late_fusion.FrameMlp, {"window": None}),
    "late-mlp-window-4": Late(late_fusion.FrameMlp, {"window": 4}),
    "late-attention": Late(late_fusion.TokenTransformer),
}
DEFAULT = ("lstta", "vision+sound", "vision+text", "sound+text", "shuffled-sound")
DEFAULT += ("late-mlp", "late-mlp-pooled-sound", "late-attention")


def load_base(
    towers: Towers, answers: Sequence[str], modalities: Sequence[str] = ALL
) -> TrimodalForFrameClassification:
    """Towers with a head on top, new but for what the embedded vision tower knows of digits.

    Args:
        towers: where they are.
        answers: what can be answered.
        modalities: which towers to take; always that for vision, since it is frames that are answered for.
    """
    labels = [*answers, "none"]
    head = digit_head(towers.vision, answers)
    model = TrimodalForFrameClassification.from_pretrained_towers(
        **{name: getattr(towers, name) for name in ALL if name in {"vision", *modalities}},
        problem_type="single_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **({} if head is None else {"projection_dim": head.in_features}),
    )
    if head is not None:
        start_from_digits(model, head)
    return model


def _train(model: nn.Module, examples: Sequence[Example], collator: Any, name: str, training: Training) -> None:
    train(
        model,
        examples,
        collator,
        steps=training.steps,
        learning_rate=training.learning_rate,
        seed=training.seed,
        output_dir=training.output,
        description=name,
    )
