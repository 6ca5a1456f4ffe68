"""Does PVLA help a new projection of frames, with few labels? Methods compared, from nothing to the table.

    python examples/benchmarks/pvla_pairs.py

A text encoder as it comes, frozen and in bfloat16, adapted by READ; the projection of the frames is new. 24 clips a
video, from files; a labelled video has a query, "the five" (all its moments; `plain`) or "the second five" (`second`),
and each clip a label. Pairs are other videos, with captions and no labels. All is trained by `PvlaTrainer`, in one
stage unless said otherwise. A seed chooses the labelled videos, the initialisation and all orders; differences are
paired by seed.

It says first how long it will take, writes each result as it comes to a file of JSON, and goes on there when it is
started again. First come the runs on validation videos, with seeds of their own, by which weights and rates are
chosen; then what tells most before the rest. `--minutes` stops it in time; `--table` prints what there is;
`readme_lines.py` writes it into `pvla.md`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase


EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from alignment_study.results import Results, chosen_options, table  # noqa: E402
from alignment_study.rows import (  # noqa: E402
    CELLS,
    OPTIONS,
    PLANS_LOOKED_AT,
    POOL,
    RATE,
    ROWS,
    SEEDS,
    STEPS,
    TUNED_ON,
    TUNING_SEEDS,
    Row,
    Run,
)
from common.embedded import WORDS  # noqa: E402
from common.training import train  # noqa: E402
from finetune_video import FEATURE_NOISE, adapt, load_base  # noqa: E402
from peft import PeftModel  # noqa: E402
from video_grounding import ordered_digits  # noqa: E402
from video_grounding.annotations import read_annotations, read_captions  # noqa: E402
from video_grounding.features import Collator, FrameEncoder, counting_only, make_examples, make_pair_examples  # noqa: E402
from video_grounding.training import Examples, grounding_metrics, predict  # noqa: E402

from peft_read import PvlaTrainer, VideoTextStates  # noqa: E402


RESULTS = Path(__file__).with_suffix(".json")


@dataclass
class Materials:
    """What all runs share: the base's folder, the tokenizer, and examples by task and split, and of pairs."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    labelled: dict[str, dict[str, Examples]]
    pairs: Examples
    captions: list[str]


def main() -> None:
    """Say what will be run, run it, and print the tables."""
    args = parse_arguments()
    results = Results(args.results)
    if not args.table:
        print_budget([*left(tuning(args), results), *left(planned(args, results), results)], results)
        run_all(args, results)
    for task, labels in CELLS:
        print(f"\n{task}, {labels} labelled videos:\n\n{table(results, task, labels)}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS, help="only these")
    parser.add_argument("--rows", default="", help="only rows whose names match this regular expression")
    parser.add_argument("--cells", nargs="+", help="only these, such as plain-25")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after the run at which these are over"
    )
    parser.add_argument("--table", action="store_true", help="print the tables of what has been run, and stop")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON for the results")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="made once")
    return parser.parse_args()


def tuning(args: argparse.Namespace) -> Iterable[Run]:
    """The runs by which weights and rates are chosen for the rows of the table, seed by seed."""
    wanted = {row.like or name for name, row in ROWS.items() if re.search(args.rows, name)}
    names = [name for name in ROWS if name in wanted]
    for seed, (weight, rate), name in itertools.product(TUNING_SEEDS, OPTIONS, names):
        if ROWS[name].pvla is not None or weight == OPTIONS[0][0]:
            yield Run(*TUNED_ON, name, seed, weight, rate, STEPS[TUNED_ON[0]])


def planned(args: argparse.Namespace, results: Results) -> Iterable[Run]:
    """The runs of the table, in order: cell by cell, and there seed by seed."""
    for ((task, labels), count), seed in itertools.product(CELLS.items(), args.seeds):
        if args.cells and f"{task}-{labels}" not in args.cells:
            continue
        for name, row in list(ROWS.items())[:count]:
            if re.search(args.rows, name) and seed in SEEDS[: row.seeds]:
                yield Run(task, labels, name, seed, *chosen_options(results, name), STEPS[task] * row.longer)


def left(runs: Iterable[Run], results: Results) -> list[Run]:
    """Those that aren't done."""
    return [run for run in runs if not results.of(**asdict(run))]


def print_budget(runs: Sequence[Run], results: Results) -> None:
    """How many runs there are to do, and how long they take, by those that are done."""
    per_step = [entry["CPU seconds"] / entry["steps"] for entry in results.entries] or [0.05]
    seconds = statistics.mean(per_step) * sum(run.steps for run in runs)
    basis = f"by {len(results.entries)} finished ones" if results.entries else "at 0.05 seconds a step"
    print(f"{len(runs)} runs to do, {seconds / 3600:.1f} CPU hours {basis}; making the data comes first.", flush=True)


def run_all(args: argparse.Namespace, results: Results) -> None:
    """Do what is left, until the time is over."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    until = time.monotonic() + 60 * args.minutes
    materials: Materials | None = None
    for plan in (lambda: tuning(args), lambda: planned(args, results)):
        runs = left(plan(), results)
        for number, run in enumerate(runs, start=1):
            if time.monotonic() > until:
                print(f"Time is over: {len(runs) - number + 1} of these runs are left.")
                return
            materials = materials or make_materials(args.cache)
            found = do(run, ROWS[run.row], materials)
            results.add(run, found)
            shown = [f"{name} {found[name]}" for name in found if name.endswith(" mAP") or name == "CPU seconds"]
            done = f"{number}/{len(runs)} {run.task} {run.labels} seed {run.seed}, {run.row}"
            print(f"{done}: {', '.join(shown)}", flush=True)


def make_materials(cache: Path) -> Materials:
    """Make videos and base once, and decode and encode the videos once."""
    base, pairs = cache / "base", cache / "pairs"
    ordered_digits.make_base(base)
    ordered_digits.make_pairs(pairs)
    tokenizer = AutoTokenizer.from_pretrained(base / "untuned")
    made = cache / f"pvla_pairs_{POOL}.pt"
    if not made.exists():
        encode, labelled = FrameEncoder(base / "frame_encoder"), {}
        for task in STEPS:
            folder = cache / f"{task}_{POOL}"
            ordered_digits.make_dataset(folder, plain=task == "plain", training_videos=POOL)
            annotations = read_annotations(folder)
            labelled[task] = {
                split: make_examples([a for a in annotations if a.split == split], encode, tokenizer, 1.0)
                for split in ("train", "validation", "test")
            }
        encoded = {"labelled": labelled, "pairs": make_pair_examples(read_captions(pairs), encode, tokenizer, 1.0)}
        draft = made.with_suffix(".draft")
        torch.save(encoded, draft)
        os.replace(draft, made)
    examples = torch.load(made)
    captions = [pair.caption for pair in read_captions(pairs)]
    return Materials(base, tokenizer, examples["labelled"], examples["pairs"], captions)


def do(run: Run, row: Row, materials: Materials) -> dict[str, Any]:
    """Train and test."""
    start = time.process_time()
    splits = materials.labelled[run.task]
    few = random.Random(run.seed).sample(splits["train"], run.labels)
    pairs = chosen_pairs(run, row, materials) if row.pairs else None
    looked_at = splits["test"][:PLANS_LOOKED_AT]
    if row.captions == "digits" and not row.pairs:
        few, looked_at = (
            [counting_only(each, WORDS, materials.tokenizer) for each in some] for some in (few, looked_at)
        )
    model = load_base(str(materials.base / "untuned"), few[0]["frame_features"].shape[-1])
    model.text_model.set_attn_implementation("eager")  # the fused one's backward in bfloat16 is slower on CPUs
    model = adapt(model, "read", None, run.seed, new_projection=not row.ridge)
    if row.stages != 1:
        trainer = fit(run, row, model, few, pairs, materials, loss=no_task)
    if row.stages != 0:
        if row.stages == 2:
            projection_of(model).requires_grad_(False)
        trainer = fit(run, Row(None) if row.stages == 2 else row, model, few, pairs, materials)
    found: dict[str, Any] = {}
    if trainer.args.uses_pvla and not row.pooled:
        found |= what_is_matched(trainer, looked_at, materials)
    split = "validation" if run.seed >= TUNING_SEEDS[0] else "test"
    found["mAP of matching by cosine"] = round(matching_map(model, splits[split], materials), 2)
    trainer.data_collator = Collator(materials.tokenizer)
    metrics = grounding_metrics(predict(trainer, splits[split]), splits[split])
    found |= {f"{split} {name}": round(value, 2) for name, value in metrics.items()}
    if row.stages == 0:
        found[f"{split} mAP"] = found["mAP of matching by cosine"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    found["task loss"] = round(logged.get("task_loss", logged["loss"]), 4)
    found["CPU seconds"] = round(time.process_time() - start, 1)
    return found


def fit(
    run: Run, row: Row, model: nn.Module, few: Examples, pairs: Examples | None, materials: Materials, loss: Any = None
) -> PvlaTrainer:
    """Train by a way, with its weight and its rate for the projection."""
    options: dict[str, Any] | None = None
    if row.pvla is not None:
        options = {"pvla_states": "inputs", "pvla_weight": run.weight, "pvla_health_steps": 0, **row.pvla}
        options["pvla_iterations"] = 30
    return train(
        model,
        few,
        Collator(materials.tokenizer, FEATURE_NOISE, few),
        steps=run.steps,
        learning_rate=RATE,
        learning_rates={"frame_projection": run.rate},
        seed=run.seed,
        description=f"{run.task} {run.labels} {run.row} {run.seed}",
        pvla=options,
        pairs=None if options is None else pairs,
        loss=loss,
        states=mean_states if row.pooled else None,
        bf16=True,
    )


def no_task(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    """A task's loss that is nothing: pairs alone train."""
    return 0 * outputs.logits.sum()


def chosen_pairs(run: Run, row: Row, materials: Materials) -> Examples:
    """The pairs of a run, with the captions that its way of training takes."""
    rng = random.Random(run.seed)
    chosen = rng.sample(range(len(materials.pairs)), row.pairs)
    captions = chosen
    if row.others:  # a circle through all of them in a random order: none keeps its own
        order = rng.sample(chosen, len(chosen))
        after = dict(zip(order, [*order[1:], order[0]], strict=True))
        captions = [after[index] for index in chosen]
    examples = []
    for video, caption in zip(chosen, captions, strict=True):
        words = {name: materials.pairs[caption][name] for name in ("input_ids", "word_mask")}
        if row.captions == "digits":
            only = " ".join(word for word in re.findall(r"\w+", materials.captions[caption]) if word in WORDS)
            encoded = materials.tokenizer(only, return_special_tokens_mask=True)
            words = {
                "input_ids": encoded["input_ids"],
                "word_mask": [1 - special for special in encoded["special_tokens_mask"]],
            }
        examples.append({**words, "frame_features": materials.pairs[video]["frame_features"]})
    return examples


def projection_of(model: nn.Module) -> nn.Module:
    """The part of the model that puts frames into the space of words."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).get_submodule("frame_projection")


def mean_states(model: nn.Module, batch: Any, outputs: Any) -> VideoTextStates:
    """The means of a video's projected frames and of a sentence's words: one "frame", one "word"."""
    inner = getattr(model, "module", model)
    words = inner.get_base_model().get_input_embeddings()(batch["input_ids"])
    mask = batch["text_token_mask"][:, : words.shape[1], None].to(words.dtype)
    frames = projection_of(inner)(batch["frame_features"])
    valid = batch["frame_mask"][..., None].to(frames.dtype)
    means = [(x * m).sum(1, keepdim=True) / m.sum(1, keepdim=True) for x, m in ((frames, valid), (words, mask))]
    return VideoTextStates(*means, met=False)


@torch.no_grad()
def matching_map(model: nn.Module, examples: Examples, materials: Materials) -> float:
    """Test mAP of projected frames by their cosine with the query's last word, which names the digit."""
    embed = model.get_base_model().get_input_embeddings()
    scores = []
    for example in examples:
        word = [i for i, is_word in zip(example["input_ids"], example["word_mask"], strict=True) if is_word][-1]
        frames = projection_of(model)(example["frame_features"])
        scores.append(torch.cosine_similarity(frames, embed(torch.tensor([word])), dim=-1).numpy())
    return grounding_metrics(scores, examples)["mAP"]


def what_is_matched(trainer: PvlaTrainer, examples: Examples, materials: Materials) -> dict[str, float]:
    """Which words and frames the plans of test queries take: shares of the mass."""
    trainer.data_collator = Collator(materials.tokenizer)
    relevant, named = [], []
    for plan, example in zip(trainer.transport_plans(examples), examples, strict=True):
        labels = example["labels"].bool()
        relevant.append(float(plan.plan[labels].sum()) / (float(labels.float().mean()) or 1))
        named.append(float(plan.plan[:, -1].sum()))
    return {
        "mass on relevant frames, over their share": round(statistics.mean(relevant), 2),
        "mass on the digit's word": round(statistics.mean(named), 2),
    }


if __name__ == "__main__":
    main()
