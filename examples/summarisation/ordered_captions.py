"""The embedded task: digit videos whose captions tell the digits in their order, and a base that tells them in none.

A small T5, made once and for all on plain captions ("a one , a five , a seven": in the order of numbers), writes
captions from the features of frames. What it is adapted to is "first a seven , then a one , finally a five".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.embedded import WORDS, digit_images
from common.files import finished, is_made
from common.training import train
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from video_grounding.features import FrameEncoder
from video_grounding.ordered_digits import NUM_CLIPS, Story, make_frame_encoder, make_story, render

from .how2 import SummarySample
from .modeling import SummaryConfig, SummaryModel
from .training import SummaryCollator


STRIDE = 2  # of the clips that are seen
FRAME_NOISE = 0.5
SOURCE_VIDEOS = 2000
GREEDY: dict[str, Any] = {"num_beams": 1, "max_length": 20, "do_sample": False}


def make_caption_story(rng: np.random.Generator) -> Story:
    """Three to five events of three or four clips, all of different digits."""
    digits = [int(digit) for digit in rng.choice(10, size=rng.integers(3, 6), replace=False)]
    lengths = rng.integers(3, 5, size=len(digits))
    gaps = rng.multinomial(NUM_CLIPS - lengths.sum(), np.full(len(digits) + 1, 1 / (len(digits) + 1)))
    events: list[int] = [-1] * gaps[0]
    for event, (length, gap) in enumerate(zip(lengths, gaps[1:], strict=True)):
        events += [event] * length + [-1] * gap
    return Story(digits, np.array(events))


def ordered_caption(digits: Sequence[int]) -> str:
    """The digits in the order in which they are shown."""
    names = [f"a {WORDS[digit]}" for digit in digits]
    middle = "".join(f" , then {name}" for name in names[1:-1])
    return f"first {names[0]}{middle} , finally {names[-1]}"


def plain_caption(digits: Sequence[int]) -> str:
    """The digits in the order of numbers, whatever the order in which they are shown."""
    return " , ".join(f"a {WORDS[digit]}" for digit in sorted(digits))


def caption_tokenizer() -> PreTrainedTokenizerFast:
    """A tokeniser of the words in these captions."""
    words = ["<pad>", "</s>", "<unk>", "a", ",", "first", "then", "finally", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_caption_base(
    folder: Path, seed: int, sizes: dict[str, tuple[str, int]], steps: int = 1200, frame_encoder: Path | None = None
) -> None:
    """Make frame encoder, base and samples of a seed below `folder`, unless they exist.

    Args:
        folder: gets `frame_encoder`, `model` and `samples.pt`, by split.
        seed: of all that is made.
        sizes: of each split, the digit images that its videos show, and how many they are.
        steps: of the base's training, of 16 videos.
        frame_encoder: one that is there already.
    """
    if is_made(folder):
        return
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 11))
    images = digit_images()
    with finished(folder) as draft:
        if frame_encoder is None:
            stories = [make_story(rng) for _ in range(1000)]
            frames = np.concatenate([render(rng, story, images["source"], 1)[::STRIDE] for story in stories])
            classes = np.concatenate([story.digit_of_clip[::STRIDE] for story in stories])
            frame_encoder = draft / "frame_encoder"
            make_frame_encoder(frame_encoder, frames, classes, steps=300)
        encode = FrameEncoder(frame_encoder)

        def samples(pool: str, count: int, caption: Any) -> list[SummarySample]:
            made = []
            for number in range(count):
                story = make_caption_story(rng)
                video = encode(render(rng, story, images[pool], 1)[::STRIDE]).numpy()
                made.append(SummarySample(str(number), video, "", caption(story.digits)))
            return made

        source = samples("source", SOURCE_VIDEOS, plain_caption)
        tokenizer = caption_tokenizer()
        model = _train_base(source, tokenizer, seed, steps, draft)
        model.save_pretrained(draft / "model")
        tokenizer.save_pretrained(draft / "model")
        made = {split: samples(pool, count, ordered_caption) for split, (pool, count) in sizes.items()}
        torch.save(made, draft / "samples.pt")


def _train_base(
    source: list[SummarySample], tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, output: Path
) -> SummaryModel:
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        num_heads=4,
        d_ff=192,
        num_layers=3,
        dropout_rate=0.0,
        **special,
    )
    text_model = T5ForConditionalGeneration(config)
    model = SummaryModel(SummaryConfig(config, source[0].video.shape[1]), text_model)
    train(
        model,
        source,  # type: ignore[arg-type]
        SummaryCollator(tokenizer, FRAME_NOISE, source),  # type: ignore[arg-type]
        steps=steps,
        batch_size=16,
        learning_rate=2e-3,
        seed=seed,
        output_dir=str(output / "training"),
        description="make base",
    )
    return model
