"""What can be set on the command line, or in a file named by `--config`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser

from peft_read import PvlaSeq2SeqTrainingArguments

from .data import ANSWER, say_windows
from .metrics import parse_windows


# What the embedded default's data and model want.
EMBEDDED = [
    "--fps",
    "1",
    "--max_frames",
    "12",
    "--max_new_tokens",
    "14",
    "--learning_rate",
    "1e-2",
    "--num_train_epochs",
    "12",
    "--per_device_train_batch_size",
    "8",
    "--per_device_eval_batch_size",
    "50",
]


@dataclass
class VlmOptions:
    """Data, model and method.

    Raises:
        ValueError: if one has a value that it can't have.
    """

    data: Path | None = field(
        default=None, metadata={"help": "Folder with an annotations.jsonl and the videos; made by default."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Video language model, a folder or a hub id; a tiny one is made by default."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "Question for each line, with {text} for its query or question."}
    )
    answer: str = field(default=ANSWER, metadata={"help": "Answer for each window, with {start} and {end}."})
    fps: float = field(default=2.0, metadata={"help": "Frames a second, at most those that a video has."})
    max_frames: int = field(default=32, metadata={"help": "Frames of a video, at most."})
    max_pixels: int | None = field(default=None, metadata={"help": "Pixels of a frame, at most; else it's scaled."})
    max_tokens: int | None = field(default=None, metadata={"help": "Samples of more tokens are left out."})
    template_options: str = field(default="{}", metadata={"help": "Options of the chat template, as JSON."})
    method: str = field(default="read", metadata={"help": "A PEFT method: read, lora, ia3, ..."})
    method_config: str = field(default="{}", metadata={"help": "Fields of the method's config, as JSON."})
    adapt: Literal["language", "vision", "both"] = field(default="language", metadata={"help": "Which towers."})
    load_in: Literal["4bit", "8bit"] | None = field(
        default=None, metadata={"help": "Quantise the base with bitsandbytes."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the base's weights; the checkpoint's by default."}
    )
    attention: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer, at most."})
    metric: Literal["auto", "grounding", "rouge", "exact"] = field(
        default="auto", metadata={"help": "How answers are scored; by the kind of the lines by default."}
    )
    evaluate: Path | None = field(default=None, metadata={"help": "Score this saved adapter instead of training."})
    test_samples: int | None = field(default=None, metadata={"help": "Take the first so many test samples alone."})
    cache: Path = field(
        default=Path("~/.cache/peft_read/vlm"), metadata={"help": "Where the embedded default is kept."}
    )

    def __post_init__(self) -> None:
        self.cache = Path(self.cache).expanduser()
        for name in ("fps", "max_frames", "max_pixels", "max_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}.")
        for name in ("template_options", "method_config"):
            try:
                given = json.loads(getattr(self, name))
            except json.JSONDecodeError as error:
                raise ValueError(f"--{name} is no JSON: {error}.") from error
            if not isinstance(given, dict):
                raise ValueError(f"--{name} must be an object of JSON, got {given!r}.")
        if self.data is not None:
            self._check_answer()
        if (self.data is None) != (self.model is None):
            raise ValueError("--data and --model go together: give both, or neither for the embedded default.")

    def _check_answer(self) -> None:
        windows = [(3.0, 7.5), (60.0, 62.0)]
        try:
            said = say_windows(windows, self.answer)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"--answer {self.answer!r} must hold {{start}} and {{end}} alone: {error}.") from error
        if parse_windows(said) != windows:
            raise ValueError(
                f"--answer {self.answer!r} says 3 to 7.5 and 60 to 62 seconds as {said!r}, from which they can't be "
                'read back. Keep to a form such as "from {start:.1f} to {end:.1f} seconds".'
            )

    @property
    def method_fields(self) -> dict[str, Any]:
        """Fields of the method's config."""
        return json.loads(self.method_config)


@dataclass
class VlmTrainingArguments(PvlaSeq2SeqTrainingArguments):
    """transformers' training arguments with PVLA's, and defaults for this script."""

    output_dir: str | None = field(default="runs/vlm", metadata={"help": "Folder for all that is written."})
    pvla_weight: float = field(default=0.0, metadata={"help": "Weight of PVLA beside the task's loss."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Times that every training sample is seen."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1: a share of all."})
    save_strategy: str = field(default="no", metadata={"help": "When checkpoints are saved."})
    report_to: str = field(default="none", metadata={"help": "Where metrics go besides."})
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between logs; below 1: a share of all."})

    def __post_init__(self) -> None:
        self.predict_with_generate, self.remove_unused_columns = True, False
        self.dataloader_pin_memory = torch.cuda.is_available()
        super().__post_init__()


def parse_options(arguments: list[str] | None = None) -> tuple[VlmOptions, VlmTrainingArguments]:
    """Read the command line, and before it the file that `--config` names, over which it counts."""
    given = sys.argv[1:] if arguments is None else arguments
    given, file = _without_config(given)
    parser = HfArgumentParser((VlmOptions, VlmTrainingArguments))
    given = _of_file(file) + given
    try:
        options, training = parser.parse_args_into_dataclasses(given)
        if options.data is None:
            options, training = parser.parse_args_into_dataclasses([*EMBEDDED, *given])
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return options, training


def command_line(options: VlmOptions) -> list[str]:
    """The options as arguments of a new process."""
    given = []
    for one in dataclasses.fields(options):
        value = getattr(options, one.name)
        if value is not None and one.name != "evaluate":
            given += [f"--{one.name}", str(value)]
    return given


def _without_config(given: list[str]) -> tuple[list[str], Path | None]:
    for place, argument in enumerate(given):
        if argument == "--config" and place + 1 < len(given):
            return given[:place] + given[place + 2 :], Path(given[place + 1])
        if argument.startswith("--config="):
            return given[:place] + given[place + 1 :], Path(argument.partition("=")[2])
    return given, None


def _of_file(path: Path | None) -> list[str]:
    """The entries of a YAML file as arguments."""
    if path is None:
        return []
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"--config {path} can't be read: {error}") from error
    if not isinstance(entries, dict):
        raise SystemExit(f"--config {path} must hold entries such as `model: my_model`.")
    given = []
    for name, value in entries.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        given += [f"--{name}", *map(str, values)]
    return given
