"""Adapt a frozen encoder-decoder to write summaries of videos.

Without arguments it makes digit videos and a small base, which tells the digits of a video in no order, once; adapts
it with READ to captions in order ("first a seven , then a one , finally a five") and, for comparison, with its output
layer alone; scores both by ROUGE and exact match, saves the adapter and loads it again in a new process:

    python examples/summarise_video.py

With your own data and model:

    python examples/summarise_video.py --data my_videos --model my_bart --frame-encoder my_vision_model
    python examples/summarise_video.py --data how2 --model facebook/bart-base

The data folder holds videos and an `annotations.jsonl`, one object a line: `video` (a path relative to the folder),
`query` (what is said or asked; it may be a blank), `summary` and `split` (train, validation or test). Or it is
How2-like: text of tokens in `sum_train`, `sum_cv` and `sum_devtest`, features in `video_action_features`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from common.annotations import ANNOTATIONS, SPLITS, decode_clips, read_entries
from common.files import RESULTS, check_output
from common.saved import check_saved_adapter
from common.training import OPTIMIZER, train
from huggingface_hub import EvalResult
from peft import PeftModel, get_peft_config, get_peft_model
from summarisation.how2 import SummarySample, read_how2
from summarisation.modeling import SummaryConfig, SummaryModel
from summarisation.ordered_captions import FRAME_NOISE, GREEDY, make_caption_base
from summarisation.rouge import TOKENIZERS, exact_match, rouge
from summarisation.training import GENERATION, SummaryCollator, summarise
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, set_seed
from video_grounding.features import FrameEncoder

from peft_read import describe_adapter


METHODS: dict[str, dict[str, Any]] = {
    "read": {"r": 16, "cell": "gru"},
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]},
}
RATE, HEAD_RATE = 1e-2, 1e-2
SIZES = {"train": ("train", 200), "validation": ("train", 50), "test": ("test", 200)}
SHOWN = 4


def main() -> None:
    """Make or read data and base, train, and report."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    if not args.evaluate:
        check_output(args.output)
    if args.data is None:
        made = args.cache / f"captions-{args.seed}"
        make_caption_base(made, args.seed, SIZES)
        samples = torch.load(made / "samples.pt", weights_only=False)
        args.model = str(made / "model")
    else:
        samples = read_samples(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    collator = SummaryCollator(tokenizer)
    options = GREEDY if args.data is None else GENERATION
    if args.evaluate:
        model = PeftModel.from_pretrained(load_base(args.model, samples), args.evaluate)
        print(json.dumps(score(model, samples["test"], collator, options, args.tokenizer)[0]))
        return
    results: dict[str, Any] = {}
    written = {}
    for method in dict.fromkeys((args.method, "head")):
        model = adapt(load_base(args.model, samples), method, args)
        start = time.perf_counter()
        noisy = SummaryCollator(tokenizer, FRAME_NOISE if args.data is None else 0.0, samples["train"])
        trainer = train(
            model,
            samples["train"],
            noisy,  # type: ignore[arg-type]
            steps=args.steps,
            learning_rate=args.learning_rate if method != "head" else HEAD_RATE,
            learning_rates={"lm_head": HEAD_RATE},
            seed=args.seed,
            output_dir=str(args.output),
            description=method,
        )
        test, written[method] = score(model, samples["test"], collator, options, args.tokenizer)
        results[method] = {
            "trainable weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "training seconds": round(time.perf_counter() - start, 1),
            "test": test,
        }
        (args.output / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
        if isinstance(model, PeftModel):
            if method == "read":
                describe(args, model, {split: len(some) for split, some in samples.items()}, test)
            trainer.save_model(str(args.output / "adapter"))
    report(results, written, samples["test"][:SHOWN])
    if args.method != "head":
        again = ["--model", args.model, "--data", str(args.data)] if args.data is not None else []
        again += ["--frame-encoder", args.frame_encoder] if args.frame_encoder else []
        again += ["--seed", str(args.seed), "--cache", str(args.cache), "--tokenizer", args.tokenizer]
        again += ["--clip-seconds", str(args.clip_seconds)]
        same = check_saved_adapter(__file__, args.output / "adapter", again, results[args.method]["test"])
        print(f"Loaded again in a new process: {json.dumps(same)}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with annotations.jsonl and videos, or How2-like (default: made)"
    )
    parser.add_argument("--model", help="encoder-decoder to adapt, a folder or hub id (default: made once)")
    parser.add_argument("--frame-encoder", help="vision model of transformers for videos' frames, a folder or hub id")
    parser.add_argument("--clip-seconds", type=float, default=1.0, help="seconds of video for a frame")
    parser.add_argument("--method", default="read", choices=[*METHODS, "head"], help="what is trained")
    parser.add_argument("--method-config", type=json.loads, default={}, help="fields of the method's config, as JSON")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 8 videos")
    parser.add_argument("--learning-rate", type=float, default=RATE, help="peak rate of the method")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="blanks", help="of ROUGE")
    parser.add_argument("--seed", type=int, default=0, help="seed of all: what is made, initialisation, order")
    parser.add_argument("--output", type=Path, default=Path("runs/summarise_video"), help="folder for the results")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="folder for what is made once"
    )
    parser.add_argument("--evaluate", metavar="ADAPTER", help="load this adapter and print its test scores only")
    args = parser.parse_args()
    if (args.data is None) != (args.model is None):
        parser.error("--data and --model go together: the default of one doesn't fit another of the other")
    if args.data is not None and (args.data / ANNOTATIONS).is_file() and args.frame_encoder is None:
        parser.error(f"{args.data} holds videos: name a --frame-encoder for their frames")
    if args.steps <= 0 or args.clip_seconds <= 0:
        parser.error("--steps and --clip-seconds must be positive")
    return args


def read_samples(args: argparse.Namespace) -> dict[str, list[SummarySample]]:
    """By split, the samples of a folder of one's own."""
    if not (args.data / ANNOTATIONS).is_file():
        return {split: read_how2(args.data, split) for split in (["test"] if args.evaluate else SPLITS)}
    encode = FrameEncoder(args.frame_encoder)
    features: dict[str, Any] = {}
    samples: dict[str, list[SummarySample]] = {split: [] for split in SPLITS}
    for entry, line in read_entries(args.data):
        if not isinstance(entry.get("summary"), str) or not entry["summary"].strip():
            raise ValueError(f"{line}: field 'summary' is missing or no text.")
        video = entry["video"]
        if video not in features:
            features[video] = encode(decode_clips(args.data / video, args.clip_seconds)).numpy()
        samples[entry["split"]].append(SummarySample(video, features[video], entry["query"].strip(), entry["summary"]))
    return samples


def load_base(name: str, samples: dict[str, list[SummarySample]]) -> SummaryModel:
    """The model to adapt: one that was saved as a whole, or an encoder-decoder with a new projection of the frames."""
    config = AutoConfig.from_pretrained(name)
    if isinstance(config, SummaryConfig):
        return SummaryModel.from_pretrained(name)
    model = SummaryModel(
        SummaryConfig(config, samples["test"][0].video.shape[1]), AutoModelForSeq2SeqLM.from_pretrained(name)
    )
    model.name_or_path = name
    return model


def adapt(model: SummaryModel, method: str, args: argparse.Namespace) -> nn.Module:
    """Freeze all but the output layer, and the projection if that is new; add an adapter of a PEFT method."""
    set_seed(args.seed)
    saved = isinstance(AutoConfig.from_pretrained(model.name_or_path), SummaryConfig)
    trained = ["lm_head"] if saved else ["frame_projection"]
    if method != "head":
        fields = METHODS[method] | args.method_config
        return get_peft_model(
            model, get_peft_config({"peft_type": method.upper(), "modules_to_save": trained, **fields})
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f"{part}." in name for part in trained))
    return model


def score(
    model: nn.Module, samples: list[SummarySample], collator: SummaryCollator, options: dict[str, Any], tokenizer: str
) -> tuple[dict[str, float], list[str]]:
    """ROUGE and exact match of a model's summaries, and these."""
    texts = summarise(model, samples, collator, options=options)
    references = [sample.summary for sample in samples]
    return rouge(texts, references, tokenizer) | {"exact match": exact_match(texts, references)}, texts


def describe(args: argparse.Namespace, model: PeftModel, sizes: dict[str, int], scores: dict[str, float]) -> None:
    """Tell the adapter's card what it was trained on, how, and what it scored."""
    name = "ordered digit captions" if args.data is None else args.data.name
    data = (
        f"Summaries of videos, `{name}`: "
        + ", ".join(f"{count} {split} videos" for split, count in sizes.items())
        + "."
    )
    if args.data is None:
        data += " They and the base model were made by `examples/summarise_video.py` of peft-read."
    training = {
        "steps": args.steps,
        "batch size": 8,
        "peak learning rate": args.learning_rate,
        "optimizer": OPTIMIZER,
        "seed": args.seed,
    }
    results = [
        EvalResult("summarization", name.replace(" ", "-"), name, metric, round(value, 2), dataset_split="test")
        for metric, value in scores.items()
    ]
    title = f"READ for {name}"
    describe_adapter(
        model, data=data, results=results, training=training, pipeline_tag="summarization", model_name=title
    )


def report(results: dict[str, Any], written: dict[str, list[str]], shown: list[SummarySample]) -> None:
    """Scores of each method, and what each writes of some videos."""
    names = list(next(iter(results.values()))["test"])
    print("\n" + " | ".join(["method", "weights", "seconds", *names]))
    for method, result in results.items():
        values = [f"{result['test'][name]:.1f}" for name in names]
        print(" | ".join([method, f"{result['trainable weights']:,}", str(result["training seconds"]), *values]))
    for row, sample in enumerate(shown):
        print(f"\ntruth: {sample.summary}")
        for method, texts in written.items():
            print(f"{method}: {texts[row]}")


if __name__ == "__main__":
    main()
