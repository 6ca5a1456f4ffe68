"""Where long-term filtering pays: clips with one label, most of whose frames don't matter.

    python examples/benchmarks/trimodal_filtering.py

Each of 64 frames shows a digit and has a sound. "Which digit at the high tone?": it is the same one in all frames with
that tone, and the clip's only label. The other frames are of the same kind: another digit comes with the other tone, a
third with noise, a fourth with silence. 0, 50, 75 or 90 % of the frames are such. Pictures, sounds and words are
features of frozen towers, those of `trimodal_question_answering.py`, drawn anew for each frame; `FeatureTower`s take
them.

Methods differ in how frames become one vector, and in whether and how LSTTA filters. Each is trained at every learning
rate of a grid for every seed; the rate is the one that is best on validation clips over all seeds. A seed changes the
clips, the initialisation and the order. Results are kept in a file and not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer, logging, set_seed


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.embedded import digit_images, text_encoder_path
from trimodal_qa import clips, towers

from peft_read import FeatureTower, LsttaConfig, TrimodalForSequenceClassification
from peft_read.trimodal.fusion import masked_mean
from peft_read.trimodal.modeling import Encoded


FRAMES, BATCH, STEPS = 64, 8, 300
SIZES = {"train": 800, "validation": 200, "test": 400}
RATES = (1e-3, 3e-3)
IRRELEVANT = (0, 50, 75, 90)
INPUTS = {"vision": "frame_features", "audio": "input_features", "text": "inputs_embeds"}
SOUNDS = (clips.LOW, clips.HIGH, clips.NOISE, clips.SILENCE)
# By method: how frames are pooled, and LSTTA's filter, None for none.
METHODS: dict[str, tuple[str, str | None]] = {
    "mean, no filter": ("mean", None),
    "mean, gate": ("mean", "gate"),
    "mean, choice": ("mean", "choice"),
    "importance, gate": ("importance", "gate"),
    "importance, choice": ("importance", "choice"),
    "attention, no filter": ("attention", None),
}


class WithAttentionPooling(TrimodalForSequenceClassification):
    """Frames are pooled by attention: a score of each adapted frame, and a softmax over them."""

    new_parts = ("fusion", "classifier", "pooling_score")

    def _add_parts(self) -> None:
        super()._add_parts()
        width = self.vision_model.config.hidden_size
        self.pooling_score = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def _pool(self, encoded: Encoded) -> Any:
        vectors, present = super()._pool(encoded)
        states, mask = self._over_time("vision", encoded)
        vectors["vision"] = masked_mean(states, mask, self.pooling_score(states).squeeze(-1).softmax(-1))
        return vectors, present


def make_towers(cache: Path) -> tuple[Path, Path]:
    """The folders of the towers for pictures and for sound, made once."""
    vision, audio = cache / "question_answering" / "vision", cache / "question_answering" / "audio_8"
    towers.make_vision_tower(vision)
    towers.make_audio_tower(audio, 8)
    return vision, audio


class Features:
    """Features of frames and sounds by what is seen and heard, and of questions by what is asked."""

    @torch.no_grad()
    def __init__(self, vision: Path, audio: Path, split: str) -> None:
        rng = np.random.default_rng(split == "test")
        images = digit_images()["test" if split == "test" else "train"]
        processor, model = AutoImageProcessor.from_pretrained(vision), AutoModel.from_pretrained(vision).eval()
        self.pictures = []
        for digit in range(10):
            sides = rng.integers(2, size=200)
            shown = [np.where(np.arange(2) == side, digit, clips.NOTHING) for side in sides]
            frames = [clips.render_frame(rng, digits, images) for digits in shown]
            pixels = processor(frames, return_tensors="pt")["pixel_values"]
            self.pictures.append(model(pixels).last_hidden_state.mean(1))
        extractor, hearing = AutoFeatureExtractor.from_pretrained(audio), AutoModel.from_pretrained(audio).eval()
        heard = rng.integers(len(SOUNDS), size=(200, 8))
        waves = [clips.render_sound(rng, row) for row in heard]
        spectrograms = extractor(waves, sampling_rate=clips.RATE, return_tensors="pt")["input_values"]
        states = hearing(spectrograms).last_hidden_state[:, -8:].flatten(0, 1)
        self.sounds = [states[torch.from_numpy(heard.flatten() == sound)] for sound in SOUNDS]
        tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
        reading = AutoModel.from_pretrained(text_encoder_path()).eval()
        self.words = {}
        for tone, (name, _) in clips.TONES.items():
            asked = [question.format(digit="digit", tone=name) for question in clips.QUESTIONS]
            encoded = [tokenizer(question, return_tensors="pt") for question in asked]
            self.words[tone] = [reading(**each).last_hidden_state[0] for each in encoded]

    def make(self, count: int, irrelevant: int, seed: int) -> dict[str, Tensor]:
        """A set of clips, as the model takes them."""
        rng = np.random.default_rng(seed)
        longest = max(len(words) for each in self.words.values() for words in each)
        width = self.words[clips.LOW][0].shape[1]
        batch = {
            "frame_features": torch.empty(count, FRAMES, self.pictures[0].shape[1]),
            "input_features": torch.empty(count, FRAMES, self.sounds[0].shape[1]),
            "inputs_embeds": torch.zeros(count, longest, width),
            "attention_mask": torch.zeros(count, longest, dtype=torch.long),
            "labels": torch.empty(count, dtype=torch.long),
        }
        relevant = round(FRAMES * (1 - irrelevant / 100))
        for clip in range(count):
            asked = int(rng.choice(list(clips.TONES)))
            digits = rng.choice(10, size=len(SOUNDS), replace=False)  # one with each kind of sound
            others = [sound for sound in SOUNDS if sound != asked]
            heard = rng.permutation([asked] * relevant + [others[i % 3] for i in range(FRAMES - relevant)])
            for frame, sound in enumerate(heard):
                for name, bank in (
                    ("frame_features", self.pictures[digits[sound]]),
                    ("input_features", self.sounds[sound]),
                ):
                    batch[name][clip, frame] = bank[rng.integers(len(bank))]
            words = self.words[asked][rng.integers(len(self.words[asked]))]
            batch["inputs_embeds"][clip, : len(words)] = words
            batch["attention_mask"][clip, : len(words)] = 1
            batch["labels"][clip] = int(digits[asked])
        return batch


def model_of(method: str, sizes: dict[str, int], window: int, modality_dropout: float = 0.0) -> nn.Module:
    """A new model."""
    pooling, form = METHODS[method]
    cls = WithAttentionPooling if pooling == "attention" else TrimodalForSequenceClassification
    base = cls.from_pretrained_towers(
        **{modality: FeatureTower.of(modality, size, num_hidden_layers=2) for modality, size in sizes.items()},
        projection_dim=64,
        num_labels=10,
        pooling="importance" if pooling == "importance" else "mean",
        modality_dropout=modality_dropout,
    )
    options = {"frame_filter": False} if form is None else {"filter_form": form}
    return get_peft_model(
        base, LsttaConfig(r=32, num_heads=4, window=window, modules_to_save=list(cls.new_parts), **options)
    )


def batches(data: dict[str, Tensor], steps: int) -> Iterator[dict[str, Tensor]]:
    """Random batches."""
    order = torch.cat([torch.randperm(len(data["labels"])) for _ in range(steps * BATCH // len(data["labels"]) + 1)])
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        yield {name: values[chosen] for name, values in data.items()}


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, Tensor]) -> float:
    """In per cent."""
    model.eval()
    parts = range(0, len(data["labels"]), 100)
    inputs = [{name: v[at : at + 100] for name, v in data.items() if name != "labels"} for at in parts]
    guesses = torch.cat([model(**each).logits.argmax(-1) for each in inputs])
    return 100 * float((guesses == data["labels"]).float().mean())


def run(
    method: str, data: dict[str, dict[str, Tensor]], rate: float, seed: int, steps: int, window: int
) -> dict[str, Any]:
    """Train and score one model; with a filter, the mean importance of frames at each level is in `importance`."""
    set_seed(seed)
    model = model_of(method, sizes_of(data["train"]), window)
    started = time.process_time()
    weights = train(model, data["train"], rate, steps)
    result: dict[str, Any] = {"weights": weights, "seconds": time.process_time() - started}
    result |= {split: accuracy(model, data[split]) for split in ("validation", "test")}
    if METHODS[method][1] is not None:
        levels = model.get_frame_importance()
        result["importance"] = [float(each.mean()) for each in levels]
    return result


def sizes_of(data: dict[str, Tensor]) -> dict[str, int]:
    """By modality, the size of its features."""
    return {modality: data[name].shape[-1] for modality, name in INPUTS.items()}


def train(model: nn.Module, data: dict[str, Tensor], rate: float, steps: int) -> int:
    """Train a model; the number of its trained weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for batch in batches(data, steps):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return sum(p.numel() for p in trained)


def main() -> None:
    """Run what isn't in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of {BATCH} clips (default: {STEPS})")
    parser.add_argument("--window", type=int, default=8, help="frames in a window (default: 8)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("runs/trimodal_filtering"), help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_read", help="made once")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"window_{args.window}_{args.steps}_steps.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted = [(i, s, m, r) for i in IRRELEVANT for s in range(args.seeds) for m in args.methods for r in RATES]
    missing = [each for each in wanted if key_of(*each) not in results]
    features = {split: Features(*make_towers(args.cache), split) for split in ("train", "test")} if missing else {}
    made: tuple[int, int] | None = None
    for irrelevant, seed, method, rate in tqdm(missing, desc="runs"):
        if made != (irrelevant, seed):
            data = {
                split: features["test" if split == "test" else "train"].make(count, irrelevant, 10 * seed + number)
                for number, (split, count) in enumerate(SIZES.items())
            }
            made = irrelevant, seed
        results[key_of(irrelevant, seed, method, rate)] = run(method, data, rate, seed, args.steps, args.window)
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_table(results, args)


def key_of(irrelevant: int, seed: int, method: str, rate: float) -> str:
    """Of a run in the results."""
    return f"{irrelevant} % / {method} / {rate:g} / seed {seed}"


def print_table(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Test accuracy by method and share of irrelevant frames, at the rate that is best on validation clips."""
    print(f"{args.steps} steps, {args.seeds} seeds, windows of {args.window}\n")
    print(f"| pooling, filter | {' | '.join(f'{share} %' for share in IRRELEVANT)} |\n|---|{'---|' * len(IRRELEVANT)}")
    for method in args.methods:
        cells = []
        for share in IRRELEVANT:
            runs = {r: [results[key_of(share, s, method, r)] for s in range(args.seeds)] for r in RATES}
            best = max(RATES, key=lambda rate: statistics.mean(each["validation"] for each in runs[rate]))
            scores = [each["test"] for each in runs[best]]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.1f} ± {spread:.1f}")
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
