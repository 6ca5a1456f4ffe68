r"""Questions that only pictures, sound and text together answer: LSTTA in three frozen towers, and what it is worth.

Without arguments it makes clips with a sound track in which handwritten digits are seen and tones are heard, and
questions about them ("which digit at the high tone?"); it makes a vision and an audio tower, takes a pretrained text
encoder, and compares LSTTA with pairs of modalities, with late fusion, and with sound in the wrong order:

    python examples/trimodal_question_answering.py

With your own clips and towers:

    python examples/trimodal_question_answering.py --data my_clips --vision my_vision_model --audio my_audio_model \
        --text my_text_model

The data folder holds an `annotations.jsonl` with one object a line: `video` (a path relative to the folder), `query`,
`split` (train, validation or test) and `answers` ([[start, end, answer], ...] in seconds, empty where there is none).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common.annotations import SPLITS
from common.embedded import text_encoder_path
from common.files import RESULTS, check_output
from common.saved import check_saved_adapter
from common.training import OPTIMIZER
from huggingface_hub import EvalResult
from peft import PeftModel
from torch import nn
from trimodal_qa import clips, late_fusion, towers
from trimodal_qa.annotations import Annotation, answers_of, read_annotations
from trimodal_qa.inputs import Example, make_examples
from trimodal_qa.methods import DEFAULT, METHODS, Late, Lstta, Towers, Training, load_base
from trimodal_qa.report import Shown, draw_answers
from trimodal_qa.scores import choose_threshold, decide, micro_f1, predict

from peft_read import TrimodalProcessor, describe_adapter


LEARNING_RATE, LATE_LEARNING_RATE = 5e-3, 3e-3
ADAPTER = "adapter"
SHOWN = 2  # test clips in the picture


def main() -> None:
    """Make or read clips and towers, train, and report."""
    started = time.perf_counter()
    args = parse_arguments()
    if not args.evaluate:
        check_output(args.output)
    transformers.logging.set_verbosity_error()
    make_defaults(args)
    annotations = read_annotations(args.data)
    answers = answers_of(annotations)
    chosen = Towers(args.vision, args.audio, args.text)
    processor = TrimodalProcessor.from_pretrained_towers(
        vision=chosen.vision, audio=chosen.audio, text=chosen.text, num_frames=args.frames
    )
    by_split = {split: [each for each in annotations if each.split == split] for split in SPLITS}
    wanted = SPLITS[1:] if args.evaluate else SPLITS
    examples = {split: make_examples(by_split[split], processor, answers) for split in wanted}
    if args.evaluate:
        model = PeftModel.from_pretrained(load_base(chosen, answers), args.evaluate)
        print(json.dumps(evaluate(model, examples, METHODS["lstta"].collator)[0]))
        return

    results: dict[str, dict[str, Any]] = {}
    decided: dict[str, list[np.ndarray]] = {}
    encoded: dict[str, list[Example]] = {}
    importance: list[np.ndarray | None] = [None] * SHOWN
    for name in args.methods:
        method = METHODS[name]
        training = training_of(args, method)
        if isinstance(method, Lstta):
            given = {split: method.inputs(examples[split], args.seed) for split in SPLITS}
            collator: Any = method.collator
        else:
            if not encoded:
                base = load_base(chosen, answers)
                encoded = {split: late_fusion.encode(base, examples[split]) for split in SPLITS}
            given, collator = encoded, late_fusion.collate
        start = time.perf_counter()
        model = method.fit(name, chosen, answers, given["train"], training)
        seconds = time.perf_counter() - start
        scores, probabilities = evaluate(model, given, collator)
        results[name] = {
            "trainable weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "training seconds": round(seconds, 1),
            **scores,
        }
        decided[name] = [decide(each, scores["threshold"]) for each in probabilities]
        (args.output / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
        if name == "lstta":
            describe(args, model, {split: len(each) for split, each in by_split.items()}, answers, scores)
            model.save_pretrained(args.output / ADAPTER)
            importance = frame_importance(model, examples["test"][:SHOWN], collator)

    print_table(results)
    draw(args, by_split["test"], examples["test"], answers, decided, importance)
    if "lstta" in results:
        check_saved(args, results["lstta"])
    print(f"All in {time.perf_counter() - started:.0f} seconds.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with annotations.jsonl and clips (default: made once)")
    parser.add_argument("--vision", help="vision tower, a folder or hub id (default: made once)")
    parser.add_argument("--audio", help="audio tower, a folder or hub id (default: made once)")
    parser.add_argument("--text", help="text tower, a folder or hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--clips", default="short", choices=clips.FRAMES, help="which clips to make (default: short)")
    parser.add_argument("--frames", type=int, help="frames taken of each clip (default: 8, of made clips all)")
    parser.add_argument(
        "--methods", nargs="+", default=DEFAULT, choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--steps", type=int, default=150, help="training steps, of 8 clips (default: 150)")
    parser.add_argument("--learning-rate", type=float, help="peak rate (default: 5e-3, 3e-3 for late fusion)")
    parser.add_argument("--seed", type=int, default=0, help="seed of made clips, initialisation and order")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/trimodal_question_answering"), help="folder for the results"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="folder for what is made once"
    )
    parser.add_argument("--evaluate", metavar="ADAPTER", help="load this adapter and print its scores only")
    args = parser.parse_args()
    given = [getattr(args, name) is not None for name in ("vision", "audio", "text")]
    if any(given) and not all(given):
        parser.error("--vision, --audio and --text go together: name all three towers, or none")
    if args.data is not None and not all(given):
        parser.error(
            "--data needs --vision, --audio and --text: the towers made here know their digits and tones only"
        )
    if args.steps <= 0 or (args.frames is not None and args.frames <= 0):
        parser.error("--steps and --frames must be positive")
    return args


def make_defaults(args: argparse.Namespace) -> None:
    """Make what the command line leaves to the embedded default, once, and name it in `args`."""
    folder = args.cache / "question_answering"
    args.frames = args.frames or clips.FRAMES[args.clips]
    if args.data is None:
        args.data = folder / f"{args.clips}_clips_{args.seed}"
        clips.make_dataset(args.data, args.clips, args.seed)
    if args.vision is None:
        args.vision, args.audio = str(folder / "vision"), str(folder / f"audio_{args.frames}")
        args.text = str(text_encoder_path())
        towers.make_vision_tower(Path(args.vision))
        towers.make_audio_tower(Path(args.audio), args.frames)


def training_of(args: argparse.Namespace, method: Lstta | Late) -> Training:
    """How to train a method."""
    default = LEARNING_RATE if isinstance(method, Lstta) else LATE_LEARNING_RATE
    return Training(args.steps, args.learning_rate or default, args.seed, str(args.output))


def evaluate(
    model: nn.Module, examples: dict[str, list[Example]], collator: Any
) -> tuple[dict[str, float], list[np.ndarray]]:
    """F1 on validation and test clips, with the threshold that suits the former; and probabilities of the latter."""
    of_split = {split: predict(model, examples[split], collator) for split in SPLITS[1:]}
    threshold = choose_threshold(of_split["validation"], examples["validation"])
    scores = {split: micro_f1(of_split[split], examples[split], threshold) for split in SPLITS[1:]}
    return {"threshold": threshold} | scores, of_split["test"]


@torch.inference_mode()
def frame_importance(model: PeftModel, examples: list[Example], collator: Any) -> list[np.ndarray | None]:
    """How much each frame counted, `(levels, frames)` for each example."""
    batch = {name: values.to(model.device) for name, values in collator(examples).items() if name != "labels"}
    model.eval()(**batch)
    levels = torch.stack(model.get_frame_importance(), 1).cpu()
    return [row[:, : len(example["labels"])].numpy() for row, example in zip(levels, examples, strict=True)]


def describe(
    args: argparse.Namespace, model: PeftModel, sizes: dict[str, int], answers: list[str], scores: dict[str, float]
) -> None:
    """Tell the adapter's card what it was trained on, how, and what it scored."""
    name = args.data.name
    data = (
        f"Questions about clips, answered for each of {args.frames} frames: one of {', '.join(answers)}, or none. "
        f"`{name}`: {sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test clips."
    )
    if args.data.parent == args.cache / "question_answering":
        name = f"digits and tones, {args.clips} clips"
        data += (
            " They and the towers for pictures and sound were made by `examples/trimodal_question_answering.py` of "
            'peft-read: handwritten digits are seen, tones are heard, and a question tells which frames count ("which '
            'digit at the high tone?").'
        )
    data += " The script's `--evaluate` loads towers and adapter, and scores them."
    training = {
        "steps": args.steps,
        "batch size": 8,
        "peak learning rate": args.learning_rate or LEARNING_RATE,
        "optimizer": OPTIMIZER,
        "seed": args.seed,
        "threshold on none, chosen on validation clips": scores["threshold"],
    }
    task = "video-classification"  # of those that the Hub knows the nearest
    kind = re.sub(r"\W+", "-", name)
    results = [
        EvalResult(task, kind, name, "f1", round(scores["test"], 2), dataset_split="test", metric_name="micro F1")
    ]
    title = f"LSTTA for {name}"
    describe_adapter(model, data=data, results=results, training=training, pipeline_tag=task, model_name=title)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """The test score of each method."""
    print(f"\n{'method':22} {'weights':>8} {'seconds':>8} {'test F1':>8}")
    for method, result in results.items():
        weights, seconds = result["trainable weights"], result["training seconds"]
        print(f"{method:22} {weights:8,} {seconds:8} {result['test']:8.1f}")


def draw(
    args: argparse.Namespace,
    annotations: list[Annotation],
    examples: list[Example],
    answers: list[str],
    decided: dict[str, list[np.ndarray]],
    importance: list[np.ndarray | None],
) -> None:
    """Draw a few test clips with what each method answers."""
    path = args.output / "answers.png"
    names = [*answers, None]
    shown = [
        Shown(
            annotation.video,
            annotation.query,
            [names[label] for label in examples[number]["labels"]],
            {method: [names[label] for label in labels[number]] for method, labels in decided.items()},
            importance[number],
        )
        for number, annotation in enumerate(annotations[:SHOWN])
    ]
    draw_answers(path, shown)
    print(f"\nFrames, their importance and the answers of {len(shown)} test clips: {path}")


def check_saved(args: argparse.Namespace, expected: dict[str, Any]) -> None:
    """Load the saved adapter in a new process of this script."""
    options = ["--data", str(args.data), "--frames", str(args.frames)]
    options += ["--vision", args.vision, "--audio", args.audio, "--text", args.text]
    scores = {name: expected[name] for name in ("threshold", "validation", "test")}
    again = check_saved_adapter(__file__, args.output / ADAPTER, options, scores)
    print(f"Loaded again in a new process: test F1 {again['test']:.1f}")


if __name__ == "__main__":
    main()
