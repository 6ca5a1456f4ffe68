"""Run a public benchmark with the settings of a recipe, on features that you have.

    python examples/run_recipe.py examples/recipes/qvhighlights.yaml --data my_features --base my_base

READ adapts a frozen base. A base is what `--method full` leaves, from the same set, another one, or an earlier stage:

    python examples/run_recipe.py examples/recipes/qvhighlights.yaml --data my_features --method full --output full
    python examples/run_recipe.py examples/recipes/qvhighlights.yaml --data my_features --base full/model

Without `--base` the blocks stay as they were initialised (How2: as `--model` comes), and everything outside of them is
trained beside the adapter. `--videos 100` trains on that many samples, drawn by `--seed`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common.files import RESULTS, check_output
from common.machine import describe_machine
from common.recipes import METHODS, Recipe, make_trainer, read_recipe
from grounding.benchmarks import BENCHMARKS, submission
from grounding.files import Sample
from grounding.modeling import MomentConfig, MomentModel
from grounding.training import LABELS, MomentCollator, Prediction, predict
from peft import PeftModel, get_peft_model
from summarisation.how2 import SummarySample, read_how2
from summarisation.modeling import SummaryConfig, SummaryModel
from summarisation.rouge import rouge
from summarisation.training import SummaryCollator, summarise
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from peft_read import ReadConfig


SUMMARISATION = "how2"
HEADS = ("saliency_head", "span_head", "score_head")
PREDICTIONS = "predictions.jsonl"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and score what the command line asks for; returns what it writes into results.json."""
    args = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    recipe = read_recipe(args.recipe)
    if recipe.benchmark not in (*BENCHMARKS, SUMMARISATION):
        raise ValueError(f"{args.recipe}: unknown benchmark {recipe.benchmark!r}.")
    domains = args.domains or recipe.domains or [""]
    unknown = set(args.domains or ()) - set(recipe.domains)
    if unknown:
        raise ValueError(f"--domains {sorted(unknown)[0]}: the recipe has {recipe.domains or 'none'}.")
    check_output(args.output)
    run = run_summarisation if recipe.benchmark == SUMMARISATION else run_grounding
    scores: dict[str, dict[str, float]] = {}
    results = {"recipe": recipe.__dict__, "method": args.method, "seed": args.seed, "machine": describe_machine()}
    for domain in domains:
        scores[domain] = run(recipe, args, domain)
        print(f"{recipe.benchmark} {domain}: {json.dumps(scores[domain])}", flush=True)
        results["scores"] = scores
        (args.output / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
    if len(domains) > 1:
        names = scores[domains[0]]
        average = {name: sum(each[name] for each in scores.values()) / len(scores) for name in names}
        print(f"{recipe.benchmark}, average of {len(domains)} domains: {json.dumps(average)}")
        results["average"] = average
        (args.output / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file of examples/recipes")
    parser.add_argument("--data", type=Path, required=True, help="folder of annotations and features")
    parser.add_argument("--base", type=Path, help="the frozen model: a folder that --method full has written")
    parser.add_argument("--model", help="How2: the encoder-decoder and its tokeniser, a folder or hub id")
    parser.add_argument(
        "--method", choices=METHODS, default="read", help="what is trained: READ, everything, the heads"
    )
    parser.add_argument("--domains", nargs="+", help="those of the recipe to run (default: all)")
    parser.add_argument("--videos", type=int, help="training samples (default: all)")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="of the samples, the initialisation and the order")
    parser.add_argument("--output", type=Path, default=Path("runs/recipe"), help="folder for the results")
    args = parser.parse_args(arguments)
    if args.base is not None and not args.base.is_dir():
        parser.error(f"--base {args.base} isn't a folder")
    return args


def run_grounding(recipe: Recipe, args: argparse.Namespace, domain: str) -> dict[str, float]:
    """Train on a domain and score its evaluation split."""
    benchmark = BENCHMARKS[recipe.benchmark]
    samples: list[Sample] = few(benchmark.read(args.data, "train", domain, **recipe.data), args.videos, args.seed)
    evaluated: list[Sample] = benchmark.read(args.data, recipe.evaluate, domain, **recipe.data)
    set_seed(args.seed)
    if args.base is None:
        text = samples[0].text
        size, text_size = samples[0].video.shape[1], None if text is None else text.shape[1]
        slots = {} if benchmark.moments else {"num_slots": 0}
        model = MomentModel(MomentConfig(video_size=size, text_size=text_size, **(slots | recipe.model)))
        trained = [name for name, _ in model.named_children() if name not in ("encoder", "decoder")]
    else:
        model = MomentModel.from_pretrained(args.base)
        trained = [name for name in HEADS if hasattr(model, name)]
    adapted = adapt(model, recipe, args.method, trained)
    trainer = train(recipe, args, adapted, samples, MomentCollator(), LABELS, domain)
    predictions: list[Prediction] = predict(trainer, evaluated)
    if benchmark.moments and recipe.benchmark == "qvhighlights":
        lines = [json.dumps(line) + "\n" for line in submission(evaluated, predictions)]
        (args.output / domain / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
    return benchmark.score(evaluated, predictions)


def run_summarisation(recipe: Recipe, args: argparse.Namespace, domain: str) -> dict[str, float]:
    """Train on the training videos and score the summaries of the evaluation split."""
    samples: list[SummarySample] = few(read_how2(args.data, "train"), args.videos, args.seed)
    evaluated = read_how2(args.data, recipe.evaluate)
    set_seed(args.seed)
    name = str(args.base or args.model or recipe.model["name"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    if args.base is None:
        text_model = AutoModelForSeq2SeqLM.from_pretrained(name)
        for setting in ("config", "generation_config"):
            getattr(text_model, setting).decoder_start_token_id = recipe.model["decoder_start_token_id"]
        model = SummaryModel(SummaryConfig(text_model.config, samples[0].video.shape[1]), text_model)
        trained = ["frame_projection"]
    else:
        model, trained = SummaryModel.from_pretrained(args.base), []
    adapted = adapt(model, recipe, args.method, trained)
    collator = SummaryCollator(tokenizer)
    train(recipe, args, adapted, samples, collator, ["labels"], domain)
    if args.method == "full":
        tokenizer.save_pretrained(args.output / "model")
    texts = summarise(adapted, evaluated, collator, batch_size=recipe.batch_size)
    lines = [json.dumps({"id": s.name, "summary": text}) + "\n" for s, text in zip(evaluated, texts, strict=True)]
    (args.output / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
    references = [sample.summary for sample in evaluated]
    return rouge(texts, references, "blanks") | rouge(texts, references, "rouge-score")


def few(samples: list[Any], count: int | None, seed: int) -> list[Any]:
    """All samples, or as many as `count`, drawn at random."""
    if count is None:
        return samples
    if not 0 < count <= len(samples):
        raise ValueError(f"--videos {count}: there are {len(samples)} training samples.")
    return random.Random(seed).sample(samples, count)


def adapt(model: nn.Module, recipe: Recipe, method: str, trained: list[str]) -> nn.Module:
    """READ in the frozen model, beside modules that are trained; or what is trained without it."""
    if method == "read":
        return get_peft_model(model, ReadConfig(**recipe.adapter, modules_to_save=trained))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or name.split(".")[0] in trained)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("--method head: this model has no head beside the base.")
    return model


def train(
    recipe: Recipe,
    args: argparse.Namespace,
    model: nn.Module,
    samples: Sequence[Any],
    collator: Any,
    labels: list[str],
    domain: str,
) -> transformers.Trainer:
    """Train, and save the adapter or the model."""
    output = args.output / domain
    trainer = make_trainer(
        recipe,
        model,
        samples,
        collator,
        method=args.method,
        epochs=args.epochs or recipe.epochs,
        labels=labels,
        output=output,
        seed=args.seed,
    )
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{recipe.benchmark} {domain}: {count:,} weights, {len(samples)} samples", flush=True)
    trainer.train()
    trainer.save_model(str(output / ("adapter" if isinstance(model, PeftModel) else "model")))
    return trainer


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
