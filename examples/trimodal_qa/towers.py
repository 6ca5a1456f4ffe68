"""The embedded default's towers for pictures and sound, trained here once on other digits and sounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common.embedded import WORDS, digit_images
from common.files import finished, is_made
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, ViTConfig, ViTImageProcessorPil, ViTModel

from peft_read import TrimodalForFrameClassification

from . import clips


WIDTH = 64
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DIGIT_HEAD = "digit_head.safetensors"
STEP = round(clips.FRAME_SECONDS * 100)  # steps of a spectrogram, a hundredth of a second each, in a frame


def make_vision_tower(folder: Path, steps: int = 900) -> None:
    """Train a small ViT to tell single digits, in either half of a frame, and save it, unless it exists."""
    if is_made(folder):
        return
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = digit_images()["source"]
    classes = rng.integers(clips.NOTHING + 1, size=10000)
    digits = np.full((len(classes), 2), clips.NOTHING)
    digits[np.arange(len(classes)), rng.integers(2, size=len(classes))] = classes
    frames = np.stack([clips.render_frame(rng, pair, images) for pair in digits])
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    config = ViTConfig(image_size=frames.shape[1:3], patch_size=(clips.HALF, clips.HALF // 2), **SHAPE)
    model = ViTModel(config, add_pooling_layer=False)
    head = nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, clips.NOTHING + 1))

    def logits(chosen: Tensor) -> Tensor:
        pixels = processor(list(frames[chosen.numpy()]), return_tensors="pt")["pixel_values"]
        return head(model(pixels).last_hidden_state.mean(1))

    _train(nn.ModuleList([model, head]), logits, torch.from_numpy(classes), steps, 64, "train vision tower")
    with finished(folder) as draft:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        save_file(head[1].state_dict(), draft / DIGIT_HEAD)


def make_audio_tower(folder: Path, frames: int, steps: int = 100) -> None:
    """Train a small audio spectrogram transformer, with a token a frame, to tell sounds; save it unless it exists."""
    if is_made(folder):
        return
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sounds = rng.integers(clips.SILENCE + 1, size=(600, frames))
    waves = [clips.render_sound(rng, each) for each in sounds]
    extractor = ASTFeatureExtractor(sampling_rate=clips.RATE, num_mel_bins=STEP, max_length=STEP * frames)
    spectrograms = extractor(waves, sampling_rate=clips.RATE, return_tensors="pt")["input_values"]
    config = ASTConfig(
        patch_size=STEP,
        time_stride=STEP,
        frequency_stride=STEP,
        max_length=STEP * frames,
        num_mel_bins=STEP,
        **SHAPE,
    )
    model, head = ASTModel(config), nn.Linear(WIDTH, clips.SILENCE + 1)

    def logits(chosen: Tensor) -> Tensor:
        return head(model(spectrograms[chosen]).last_hidden_state[:, -frames:])

    _train(nn.ModuleList([model, head]), logits, torch.from_numpy(sounds), steps, 32, "train audio tower")
    with finished(folder) as draft:
        model.save_pretrained(draft)
        extractor.save_pretrained(draft)


def _train(
    model: nn.Module, logits: Callable[[Tensor], Tensor], classes: Tensor, steps: int, batch_size: int, name: str
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    for _ in tqdm(range(steps), desc=name, leave=False):
        chosen = torch.randint(len(classes), (batch_size,))
        loss = F.cross_entropy(logits(chosen).flatten(0, -2), classes[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def start_from_digits(model: TrimodalForFrameClassification, head: nn.Linear) -> None:
    """Let a model start with logits that a head reads off the pictures alone.

    Args:
        model: as wide as the head where it fuses.
        head: what `digit_head` gives.
    """
    with torch.no_grad():
        for projection in model.fusion.projections.values():
            projection.weight.zero_()
            projection.bias.zero_()
        nn.init.eye_(model.fusion.projections["vision"].weight)
        model.classifier.weight.copy_(head.weight)
        model.classifier.bias.copy_(head.bias)


def digit_head(vision_tower: str | Path, labels: list[str]) -> nn.Linear | None:
    """What reads digits off the mean of the embedded vision tower's tokens, normalised; None of another tower.

    Args:
        vision_tower: the tower's folder.
        labels: digits in words; the head's last class, after them, is no digit.
    """
    file = Path(vision_tower) / DIGIT_HEAD
    if not file.is_file() or not set(labels) <= set(WORDS):
        return None
    rows = torch.tensor([*(WORDS.index(label) for label in labels), clips.NOTHING])
    weights = load_file(file)
    head = nn.Linear(weights["weight"].shape[1], len(rows))
    head.load_state_dict({name: weight[rows] for name, weight in weights.items()})
    return head
