"""Fine-tune a video language model on your own videos: questions, captions, or the moments that a sentence means.

Without arguments it makes short videos and a tiny SmolVLM, and adapts it with READ to say which frames show the second
of a digit's moments:

    python examples/finetune_vlm.py

With your own videos and any video language model of transformers:

    python examples/finetune_vlm.py --data my_videos --model Qwen/Qwen3-VL-2B-Instruct

The data folder holds an `annotations.jsonl` with one object a line: `video` (a path relative to the folder), `split`
(train, validation or test), and one of: `query` with `relevant_windows` ([[start, end], ...] in seconds), `question`
with `answer`, `caption`, or `messages` of a conversation. Everything of transformers' `TrainingArguments` can be set;
the page examples/vlm.md has more.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from common.annotations import SPLITS
from common.files import RESULTS, check_output
from common.processes import join_processes, leave_processes, once_a_machine, run_alone
from huggingface_hub import EvalResult
from vlm.answering import AnswerTrainer
from vlm.collator import VlmCollator
from vlm.data import Sample, read_samples
from vlm.digits import make_dataset, parse_marks
from vlm.metrics import Parse, choose_metric, parse_windows, score
from vlm.modeling import adapt_model, check_method, check_quantisation, load_adapter, load_model, load_processor
from vlm.options import VlmOptions, VlmTrainingArguments, command_line, parse_options
from vlm.report import SHOWN, draw, print_answers, print_table, write_predictions
from vlm.survey import survey

from peft_read import describe_adapter


BASE, ADAPTED, OFF = "base, zero-shot", "adapted", "adapter switched off"
Splits = dict[str, list[Sample]]


def main() -> None:
    """Adapt a model, compare it with itself before, save the adapter and try it in a new process."""
    options, training = parse_options()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_read").setLevel(logging.INFO)  # PVLA says what it takes for video and for words
    check_method(options.method, options.method_fields, options.adapt)
    check_quantisation(options.load_in)
    output, processes = Path(str(training.output_dir)), join_processes()
    if options.evaluate is None:
        check_output(output)
    data, name, parse = data_and_model(options)
    processor = load_processor(name)
    template = json.loads(options.template_options)
    collator = VlmCollator(processor, options.fps, options.max_frames, options.max_pixels, template)
    samples = look_at_samples(options, data, collator)
    metric = choose_metric(options.metric, samples["test"])
    model = load_model(name, load_in=options.load_in, dtype=options.dtype, attention=options.attention)
    if options.evaluate is not None:
        trainer = make_trainer(options, training, load_adapter(model, options.evaluate), collator, samples)
        said = trainer.answers(samples["test"])
        print(json.dumps({"test": score(said, samples["test"], metric, parse), "answers": said}))
        return

    frames = frames_of_all(collator, samples)
    adapted = adapt_model(
        model, options.method, options.method_fields, options.adapt, frames=frames, seed=training.seed
    )
    trainer = make_trainer(options, training, adapted, collator, samples)
    trainer.metric, trainer.parse = metric, parse
    answers, seconds = {}, {BASE: 0, OFF: 0}
    with adapted.disable_adapter():
        answers[BASE] = trainer.answers(samples["test"])
    start = time.time()
    trainer.train()
    seconds[ADAPTED] = round(time.time() - start)
    answers[ADAPTED] = trainer.answers(samples["test"])
    with adapted.disable_adapter():
        answers[OFF] = trainer.answers(samples["test"])
    weights = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    results = {
        row: {
            "test": score(said, samples["test"], metric, parse),
            "trainable weights": weights if row == ADAPTED else 0,
            "seconds": seconds[row],
        }
        for row, said in answers.items()
    }
    if options.method == "read":
        describe(options, training, trainer, samples, results[ADAPTED]["test"])
    trainer.save_model(str(output / "adapter"))
    if processes.is_main_process:
        report(output, collator, samples["test"], answers, results, parse)
        if processes.num_processes == 1:
            check_saved(options, training, output / "adapter", answers[ADAPTED])


def data_and_model(options: VlmOptions) -> tuple[Path, str, Parse]:
    """Data folder and model, made where none are named, and what reads windows in the answers."""
    if options.data is not None:
        return options.data, str(options.model), parse_windows
    data, model = options.cache / "videos", options.cache / "model"
    once_a_machine(join_processes(), lambda: make_embedded(data, model))
    return data, str(model), parse_marks


def make_embedded(data: Path, model: Path) -> None:
    """Videos of digits, and a model that knows digits."""
    try:
        from vlm.tiny_smolvlm import make_base

        make_base(model)
    except ImportError as error:
        raise SystemExit(
            "The embedded default is a SmolVLM, whose processor needs torchvision and num2words. In a clone of "
            f'peft-read: pip install ".[examples,vlm]". ({error})'
        ) from error
    make_dataset(data)


def look_at_samples(options: VlmOptions, data: Path, collator: VlmCollator) -> Splits:
    """The samples of each split that is needed, without those that are too long."""
    found = read_samples(data, options.prompt, options.answer)
    splits = SPLITS if options.evaluate is None else ("test",)
    kept = {
        split: survey(collator, [sample for sample in found if sample.split == split], options.max_tokens)
        for split in splits
    }
    return kept | {"test": kept["test"][: options.test_samples]}


def frames_of_all(collator: VlmCollator, samples: Splits) -> int | None:
    """How many frames every video has, None if they differ."""
    counts = {len(collator.video(sample)[0]) for split in samples.values() for sample in split}
    return counts.pop() if len(counts) == 1 else None


def make_trainer(
    options: VlmOptions, training: VlmTrainingArguments, model: Any, collator: VlmCollator, samples: Splits
) -> AnswerTrainer:
    """A Trainer on the training samples that evaluates on the validation samples, where these are needed."""
    trainer = AnswerTrainer(
        model,
        training,
        collator,
        train_dataset=samples.get("train"),
        eval_dataset=samples.get("validation", samples["test"]),
        processing_class=collator.processor,
    )
    trainer.max_new_tokens = options.max_new_tokens
    return trainer


def describe(
    options: VlmOptions,
    training: VlmTrainingArguments,
    trainer: AnswerTrainer,
    samples: Splits,
    scores: dict[str, float],
) -> None:
    """Tell the adapter's card what it was trained on, how, and what it scored."""
    name = "digits in order" if options.data is None else options.data.name
    counts = ", ".join(f"{len(samples[split])} {split}" for split in SPLITS)
    data = f"Questions about videos with generated answers. `{name}`: {counts} samples."
    if options.data is None:
        data += (
            " They and the base model were made by `examples/finetune_vlm.py` of peft-read: handwritten digits, and "
            'questions in which order matters ("which frames are the second five?").'
        )
    sizes = {"fps": options.fps, "frames at most": options.max_frames}
    told = {
        "steps": trainer.state.global_step,
        "batch size": trainer.state.train_batch_size,
        "peak learning rate": training.learning_rate,
        "seed": training.seed,
    }
    task = "video-text-to-text"
    results = [
        EvalResult(task, name.replace(" ", "-"), name, metric, round(value, 2), dataset_split="test")
        for metric, value in scores.items()
    ]
    title = f"READ for {name}"
    describe_adapter(
        trainer.model, data=data, results=results, training=told | sizes, pipeline_tag=task, model_name=title
    )


def report(
    output: Path,
    collator: VlmCollator,
    samples: list[Sample],
    answers: dict[str, list[str]],
    results: dict[str, dict[str, Any]],
    parse: Parse,
) -> None:
    """Print and write what came out."""
    print_table(results)
    print_answers(samples, answers)
    draw(output / "answers.png", collator, samples[:SHOWN], answers, parse)
    write_predictions(output / "predictions.jsonl", samples, answers, parse)
    (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nPicture, all answers and scores: {output}/answers.png, predictions.jsonl, {RESULTS}")


def check_saved(options: VlmOptions, training: VlmTrainingArguments, adapter: Path, expected: list[str]) -> None:
    """Load the saved adapter in a new process, where it must say the same to the first batch of test samples.

    Raises:
        SystemExit: if it doesn't.
    """
    batch = training.per_device_eval_batch_size
    size = sum(file.stat().st_size for file in adapter.rglob("*.safetensors"))
    print(f"Adapter: {adapter} ({size / 1024:.0f} KiB)", flush=True)
    given = [*command_line(options), "--test_samples", str(min(batch, len(expected)))]
    given += [
        "--per_device_eval_batch_size",
        str(batch),
        "--use_cpu",
        str(training.use_cpu),
        "--bf16",
        str(training.bf16),
    ]
    given += ["--fp16", str(training.fp16), "--evaluate", str(adapter)]
    said = json.loads(run_alone(__file__, *given, capture=True).splitlines()[-1])["answers"]
    wrong = [(before, after) for before, after in zip(expected, said, strict=False) if before != after]
    if wrong:
        raise SystemExit(f"The loaded adapter says {wrong[0][1]!r} where the trained one said {wrong[0][0]!r}.")
    print(f"Loaded again in a new process: the same answers to {len(said)} test samples")


if __name__ == "__main__":
    main()
    leave_processes()
