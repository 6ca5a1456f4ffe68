"""Fine-tune a frozen pretrained transformer on videos with text: which moments of the video does the sentence mean?

Without arguments it makes a small data set of real video files and a base model, adapts the base with READ and, for
comparison, trains its head alone, and shows both on the test videos:

    python examples/finetune_video.py

With your own videos, text transformer and vision model:

    python examples/finetune_video.py --data my_videos --model my_text_model --frame-encoder my_vision_model

Videos that have captions but no labels teach a new projection of the frames what words mean (`--pairs FOLDER`, whose
lines have `video` and `caption`; without FOLDER, 400 such videos are made):

    python examples/finetune_video.py --projection new --pairs --pvla-states inputs --pvla-negatives --pvla-weight 3

The data folder holds an `annotations.jsonl` with one object a line: `video` (a path relative to the folder), `query`,
`split` (train, validation or test), and either `relevant_windows` ([[start, end], ...] in seconds) or `clip_labels`
(0 or 1 per clip).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from common.annotations import SPLITS, decode_clips
from common.files import RESULTS, check_output
from common.processes import from_main_process, join_processes, leave_processes, once_a_machine, run_alone
from common.saved import check_saved_adapter
from common.training import OPTIMIZER, train
from huggingface_hub import EvalResult
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from video_grounding import ordered_digits
from video_grounding.annotations import Annotation, read_annotations, read_captions
from video_grounding.features import Collator, FrameEncoder, make_examples, make_pair_examples
from video_grounding.modeling import GroundingConfig, GroundingModel
from video_grounding.report import draw_saliency
from video_grounding.training import Examples, grounding_metrics, predict

from peft_read import PvlaTrainer, PvlaTrainingArguments, describe_adapter
from peft_read.pvla.picture import ExamplePlan
from peft_read.pvla.states import BLOCK_SOURCES


METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "read": {"r": 16, "cell": "gru"},
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
}
LEARNING_RATE, HEAD_LEARNING_RATE = 5e-3, 1e-2
FEATURE_NOISE = 0.5
PAIRS_IN_STEP = 16  # on all devices together
SHOWN = 4  # test videos in the picture
PVLA_STATES = (*BLOCK_SOURCES, "inputs")
MADE = Path("made once")  # what --pairs is without a folder


def main() -> None:
    """Make or read the data and the base, train, and report."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    if args.prepare:
        make_defaults(args)
        return
    processes = join_processes()
    prepare(args, processes)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    annotations, examples, pairs = from_main_process(processes, lambda: read_examples(args, tokenizer))
    collator = Collator(tokenizer)
    feature_size = examples["test"][0]["frame_features"].shape[-1]

    if args.evaluate:
        model = PeftModel.from_pretrained(load_base(args.model, feature_size), args.evaluate)
        print(json.dumps(grounding_metrics(predict(predictor(model, collator), examples["test"]), examples["test"])))
        return

    saliency, results, plans = {}, {}, []
    for method in dict.fromkeys((args.method, "head")):
        base = load_base(args.model, feature_size)
        model = adapt(base, method, args.method_config, args.seed, new_projection=args.projection == "new")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        start = time.perf_counter()
        noisy = Collator(tokenizer, FEATURE_NOISE, examples["train"])
        trainer = fit(args, model, method, noisy, examples["train"], pairs)
        seconds = time.perf_counter() - start
        trainer.data_collator = collator
        if trainer.args.uses_pvla:
            plans = trainer.transport_plans(examples["test"][:SHOWN])
        saliency[method] = predict(trainer, examples["test"])
        results[method] = {
            "trainable weights": trained,
            "training seconds": round(seconds, 1),
            "validation": grounding_metrics(predict(trainer, examples["validation"]), examples["validation"]),
            "test": grounding_metrics(saliency[method], examples["test"]),
        }
        if processes.is_main_process:
            (args.output / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
        if isinstance(model, PeftModel):
            if method == "read":
                sizes = {split: len(each) for split, each in annotations.items()} | {"pairs": len(pairs or ())}
                describe(args, model, sizes, results[method]["test"])
            trainer.save_model(str(args.output / "adapter"))

    if processes.is_main_process:
        print_table(results)
        draw(args, annotations["test"][:SHOWN], examples["test"][:SHOWN], saliency, plans)
        if args.method != "head":
            check_saved(args, results[args.method]["test"])


def prepare(args: argparse.Namespace, processes: PartialState) -> None:
    """Refuse what can't work before anything is made; make what the command line leaves to the default; name it."""
    if not args.evaluate:
        if args.batch_size % processes.num_processes:
            raise SystemExit(f"--batch-size {args.batch_size} is no multiple of {processes.num_processes} processes.")
        if processes.is_main_process:
            check_output(args.output)
        make_config(args.method, args.method_config, [])  # a mistake shows before anything is made, here and below
    if processes.is_main_process:
        if args.data is not None:
            read_annotations(args.data)
        if args.pairs not in (None, MADE):
            read_captions(args.pairs)
    if processes.num_processes == 1:
        make_defaults(args)
    elif args.data is None or args.model is None or args.pairs == MADE:
        once_a_machine(processes, lambda: run_alone(__file__, *sys.argv[1:], "--prepare"))
    name_defaults(args)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with annotations.jsonl and videos (default: made once)")
    parser.add_argument("--model", help="text transformer to adapt, a folder or hub id (default: made once)")
    parser.add_argument("--frame-encoder", help="vision model of transformers for the frames, a folder or hub id")
    parser.add_argument("--clip-seconds", type=float, default=ordered_digits.CLIP_SECONDS, help="length of a clip")
    parser.add_argument("--method", default="read", help="a PEFT method, such as read or lora, or head for none")
    parser.add_argument("--method-config", type=fields_of_json, help="fields of the method's config, as JSON")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a step, on all devices together")
    parser.add_argument("--learning-rate", type=float, help="peak rate (default: 5e-3; the head's is 1e-2)")
    parser.add_argument("--pvla-weight", type=float, default=0.0, help="weight of the alignment loss (default: 0)")
    parser.add_argument("--pvla-gradient-share", type=float, help="instead: its gradient, as a share of the task's")
    parser.add_argument("--pvla-states", default="last_block", choices=PVLA_STATES, help="which states it aligns")
    parser.add_argument("--pvla-negatives", action="store_true", help="tell sentences from the batch's other ones")
    parser.add_argument(
        "--pairs", type=Path, nargs="?", const=MADE, help="folder of captioned videos to align (default: made once)"
    )
    parser.add_argument(
        "--projection",
        choices=("saved", "new"),
        default="saved",
        help="of frames: as the base has it, or trained anew",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all: what is made, initialisation, order")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_video"), help="folder for the results")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="folder for what is made once"
    )
    parser.add_argument("--evaluate", metavar="ADAPTER", help="load this adapter and print its test metrics only")
    parser.add_argument("--prepare", action="store_true", help="make what is made once, and stop")
    args = parser.parse_args()
    if (args.model is None) != (args.frame_encoder is None):
        parser.error("--model and --frame-encoder go together: the default of one doesn't fit another of the other")
    if args.data is not None and args.model is None:
        parser.error("--data holds videos of yours: name a --model and a --frame-encoder; those made here know digits")
    if (args.pvla_weight or args.pvla_gradient_share) and args.method != "read":
        parser.error("--pvla-weight and --pvla-gradient-share align the blocks that --method read adapts")
    if args.pairs is not None and not (args.pvla_weight or args.pvla_gradient_share):
        parser.error("--pairs are aligned by PVLA: set --pvla-weight or --pvla-gradient-share")
    if args.clip_seconds <= 0 or args.steps <= 0 or args.batch_size <= 0:
        parser.error("--clip-seconds, --steps and --batch-size must be positive")
    return args


def fields_of_json(text: str) -> dict[str, Any]:
    """What `--method-config` is given."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"{text} is no object of JSON; expected something like '{{\"r\": 4}}'")
    return fields


def made_once(args: argparse.Namespace) -> Path:
    """The folder of what is made once for a seed."""
    return Path(args.cache) / f"digits-{args.seed}"


def make_defaults(args: argparse.Namespace) -> None:
    """Make what the command line leaves to the embedded default, once."""
    made = made_once(args)
    if args.data is None:
        ordered_digits.make_dataset(made / "videos", seed=args.seed)
    if args.pairs == MADE:
        ordered_digits.make_pairs(made / "pairs", seed=args.seed)
    if args.model is None:
        ordered_digits.make_base(made / "base", args.seed)


def name_defaults(args: argparse.Namespace) -> None:
    """Name in `args` what `make_defaults` makes."""
    if args.data is None:
        args.data = made_once(args) / "videos"
    if args.pairs == MADE:
        args.pairs = made_once(args) / "pairs"
    if args.model is None:
        base = made_once(args) / "base"
        # A base that is tuned on frames knows them by the projection that it was tuned with.
        name = "untuned" if args.projection == "new" else "model"
        args.model, args.frame_encoder = str(base / name), str(base / "frame_encoder")


def read_examples(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[Annotation]], dict[str, Examples], Examples | None]:
    """By split, the annotations, and what becomes of those that are needed; and the captioned videos, if any."""
    annotations: dict[str, list[Annotation]] = {split: [] for split in SPLITS}
    for annotation in read_annotations(args.data):
        annotations[annotation.split].append(annotation)
    encode = FrameEncoder(args.frame_encoder)
    wanted = ["test"] if args.evaluate else SPLITS
    examples = {split: make_examples(annotations[split], encode, tokenizer, args.clip_seconds) for split in wanted}
    pairs = None
    if args.pairs is not None and not args.evaluate:
        pairs = make_pair_examples(read_captions(args.pairs), encode, tokenizer, args.clip_seconds)
    return annotations, examples, pairs


def load_base(name: str, feature_size: int) -> GroundingModel:
    """The model to adapt: one that was saved as a whole, or a text transformer with a new projection and head."""
    config = AutoConfig.from_pretrained(name)
    if isinstance(config, GroundingConfig):
        return GroundingModel.from_pretrained(name)
    config = GroundingConfig(config, feature_size, AutoTokenizer.from_pretrained(name).sep_token_id)
    model = GroundingModel(config, AutoModel.from_pretrained(name))
    model.name_or_path = name
    return model


def adapt(
    model: GroundingModel, method: str, fields: dict[str, Any] | None, seed: int, new_projection: bool = False
) -> torch.nn.Module:
    """Freeze `model` but for its head, and its projection if that is new, and add an adapter of a PEFT method.

    Args:
        model: as `load_base` gives it.
        method: a PEFT method's name, or head.
        fields: of the method's config; its defaults by default.
        seed: of all that is new.
        new_projection: whether to give a model that was saved with a projection a new one.
    """
    set_seed(seed)
    is_saved = isinstance(AutoConfig.from_pretrained(model.name_or_path), GroundingConfig)
    if new_projection and is_saved:
        torch.nn.init.normal_(model.frame_projection.weight, std=0.02)
        torch.nn.init.zeros_(model.frame_projection.bias)
    trained = ["saliency_head"] if is_saved and not new_projection else ["saliency_head", "frame_projection"]
    if method == "head":
        model.requires_grad_(False)
        for name in trained:
            model.get_submodule(name).requires_grad_(True)
        return model
    return get_peft_model(model, make_config(method, fields, trained))


def make_config(method: str, fields: dict[str, Any] | None, trained: list[str]) -> PeftConfig | None:
    """The configuration of a PEFT method, None for the head alone; `trained` are the modules trained beside it."""
    if method == "head":
        return None
    fields = METHOD_DEFAULTS.get(method, {}) | (fields or {})
    try:
        return get_peft_config({"peft_type": method.upper(), "modules_to_save": trained, **fields})
    except KeyError as error:
        raise SystemExit(f"--method {method} is no PEFT method; try read, lora, ia3 or head.") from error
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--method-config doesn't fit --method {method}: {error}") from error


def fit(
    args: argparse.Namespace,
    model: torch.nn.Module,
    method: str,
    collator: Collator,
    examples: Examples,
    pairs: Examples | None,
) -> PvlaTrainer:
    """Train, with PVLA where that is asked for and there is an adapter."""
    names = ("pvla_weight", "pvla_gradient_share", "pvla_states", "pvla_negatives")
    pvla = {name: getattr(args, name) for name in names}
    if pairs is not None:
        pvla["pvla_pairs_batch_size"] = max(1, min(PAIRS_IN_STEP, len(pairs)) // join_processes().num_processes)
    return train(
        model,
        examples,
        collator,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=HEAD_LEARNING_RATE if method == "head" else args.learning_rate or LEARNING_RATE,
        learning_rates={"saliency_head": HEAD_LEARNING_RATE},
        seed=args.seed,
        output_dir=str(args.output),
        description=method,
        pvla=None if method == "head" else pvla,
        pairs=None if method == "head" else pairs,
    )


def predictor(model: torch.nn.Module, collator: Collator) -> PvlaTrainer:
    """A Trainer that predicts only."""
    arguments = PvlaTrainingArguments(
        pvla_weight=0.0,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    return PvlaTrainer(model, arguments, collator)


def describe(args: argparse.Namespace, model: PeftModel, sizes: dict[str, int], metrics: dict[str, float]) -> None:
    """Tell the adapter's card what it was trained on, how, and what it scored."""
    name = args.data.name
    data = (
        f"Temporal grounding: which {args.clip_seconds:g} s clips of a video does a query mean? `{name}`: "
        f"{sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test videos."
    )
    if sizes["pairs"]:
        data += f" {sizes['pairs']} captioned videos without labels taught the projection of the frames."
    if args.data == made_once(args) / "videos":
        name = "ordered digits"
        data += (
            " They and the base model were made by `examples/finetune_video.py` of peft-read: moving handwritten "
            'digits with distractors, and queries in which order matters ("the second seven").'
        )
    data += " The script's `--evaluate` loads base and adapter, and scores them."
    training = {
        "steps": args.steps,
        "batch size": args.batch_size,
        "peak learning rate": args.learning_rate or LEARNING_RATE,
        "optimizer": OPTIMIZER,
        "seed": args.seed,
    }
    if args.pvla_weight or args.pvla_gradient_share:
        training |= {"PVLA weight": args.pvla_weight, "PVLA gradient share": args.pvla_gradient_share}
        training |= {"PVLA states": args.pvla_states, "PVLA negatives": args.pvla_negatives}
    task = "video-classification"  # of those that the Hub knows the nearest
    results = [
        EvalResult(task, name.replace(" ", "-"), name, metric, round(value, 2), dataset_split="test")
        for metric, value in metrics.items()
    ]
    title = f"READ for {name}"
    describe_adapter(model, data=data, results=results, training=training, pipeline_tag=task, model_name=title)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """The test metrics of each method."""
    print(f"\n{'method':10} {'weights':>8} {'seconds':>8} {'test mAP':>9} {'hit@1':>6}")
    for method, result in results.items():
        weights, test = result["trainable weights"], result["test"]
        print(f"{method:10} {weights:8,} {result['training seconds']:8} {test['mAP']:9.1f} {test['hit@1']:6.1f}")


def draw(
    args: argparse.Namespace,
    shown: list[Annotation],
    examples: Examples,
    saliency: dict[str, Any],
    plans: list[ExamplePlan],
) -> None:
    """Draw a few test videos with what each method makes of them."""
    path = args.output / "saliency.png"
    videos = [decode_clips(annotation.video, args.clip_seconds) for annotation in shown]
    labels = [example["labels"].numpy() for example in examples]
    draw_saliency(path, videos, [annotation.query for annotation in shown], labels, saliency, args.clip_seconds, plans)
    print(f"\nFrames, true moments and saliency of {len(shown)} test videos: {path}")


def check_saved(args: argparse.Namespace, expected: dict[str, float]) -> None:
    """Load the saved adapter in a new process of this script."""
    options = ["--data", str(args.data), "--model", args.model, "--frame-encoder", args.frame_encoder]
    options += ["--clip-seconds", str(args.clip_seconds)]
    again = check_saved_adapter(__file__, args.output / "adapter", options, expected)
    print(f"Loaded again in a new process: test mAP {again['mAP']:.1f}, hit@1 {again['hit@1']:.1f}")


if __name__ == "__main__":
    main()
    leave_processes()
