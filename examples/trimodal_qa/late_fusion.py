"""What LSTTA is compared with: heads on what frozen towers found each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from peft_read import TrimodalForFrameClassification
from peft_read.lockstep import TowerBatch

from .inputs import Collator, Example


IGNORED = -100


@torch.no_grad()
def encode(model: TrimodalForFrameClassification, examples: Sequence[Example], batch_size: int = 50) -> list[Example]:
    """What the frozen towers find in each example, once and for all.

    Returns:
        For each example `pictures (frames, 2 * width)`, the mean of a frame's tokens and the first one; `sounds
        (frames, width)`, the mean over the time of each frame, zeros without sound; `words (words, width)`; and
        `labels (frames,)`.
    """
    model.eval()
    pad = Collator()
    encoded = []
    for start in tqdm(range(0, len(examples), batch_size), desc="encode clips", leave=False):
        part = list(examples[start : start + batch_size])
        batch = pad(part)
        output = model(**{name: values for name, values in batch.items() if name != "labels"})
        pictures = _in_time(model, "vision", output.vision_model_output, batch.get("frame_mask"))
        sounds = _in_time(model, "audio", output.audio_model_output, batch.get("audio_mask"))
        for row, example in enumerate(part):
            frames = len(example["labels"])
            seen = [pictures[row].mean(1), pictures[row][:, 0]]
            heard = sounds[row].mean(1) if sounds else torch.zeros(0, model.audio_model.config.hidden_size)
            encoded.append(
                {
                    "pictures": torch.cat([_at_frames(states, frames) for states in seen], -1),
                    "sounds": _at_frames(heard, frames),
                    "words": output.text_model_output.last_hidden_state[row, : len(example["input_ids"])],
                    "labels": example["labels"],
                }
            )
    return encoded


def _in_time(model: TrimodalForFrameClassification, modality: str, output: Any, mask: Tensor | None) -> list[Tensor]:
    """A tower's states of each sample, `(steps, tokens, width)`, those that are real; nothing of an absent tower."""
    if output is None or mask is None:
        return []
    segments = mask.shape[1] if mask.ndim == 3 else 1
    tower = getattr(model, f"{modality}_model")
    batch = TowerBatch.of(modality, tower, len(mask), mask.shape[-1], mask, segments=segments)
    timed, untimed = batch.split(output.last_hidden_state)
    real = batch.masks(timed, untimed)[0 if timed is not None else 1]
    states = timed if timed is not None else untimed.mean(1)[:, None, None]
    return [row[there] for row, there in zip(states, real[:, : states.shape[1]], strict=True)]


def _at_frames(states: Tensor, frames: int) -> Tensor:
    """Mean over the time of each frame of states `(steps, width)`, `(frames, width)`; zeros where there are none."""
    if not len(states):
        return states.new_zeros(frames, states.shape[1])
    return F.adaptive_avg_pool1d(states.T[None], frames)[0].T


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Pads what `encode` gave into a batch; labels of padding are -100."""
    batch = {
        name: pad_sequence([example[name] for example in examples], batch_first=True)
        for name in ("pictures", "sounds", "words")
    }
    for name, mask in (("pictures", "frame_mask"), ("words", "word_mask")):
        real = [torch.ones(len(example[name]), dtype=torch.bool) for example in examples]
        batch[mask] = pad_sequence(real, batch_first=True)
    labels = pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=IGNORED)
    return batch | {"labels": labels}


class LateFusion(nn.Module):
    """Reads the answer of every frame off what the towers found.

    Args:
        examples: what `encode` gave, for its sizes.
        classes: number of answers, and none.
        digit_head: adds what it reads off the pictures alone, normalised; trained further.
    """

    def __init__(self, examples: Sequence[Example], classes: int, digit_head: nn.Linear | None) -> None:
        super().__init__()
        self.sizes = {name: examples[0][name].shape[-1] for name in ("pictures", "sounds", "words")}
        self.classes = classes
        self.digit_head = digit_head

    def fuse(self, batch: dict[str, Tensor]) -> Tensor:
        """`(batch, frames, classes)`, without what the digit head adds."""
        raise NotImplementedError

    def forward(self, labels: Tensor | None = None, **batch: Tensor) -> dict[str, Any]:
        """Classify frames.

        Args:
            labels: `(batch, frames)`; with them there is a loss.
            batch: the rest of what `collate` gave.
        """
        logits = self.fuse(batch)
        if self.digit_head is not None:
            width = self.digit_head.in_features
            logits = logits + self.digit_head(F.layer_norm(batch["pictures"][..., :width], (width,)))
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return output


class FrameMlp(LateFusion):
    """A perceptron on each frame's picture, its sound and the mean of the words, side by side.

    Args:
        window: frames that share the mean over their sound; all of the clip's where None.
        hidden: width of the hidden layer.
    """

    def __init__(self, *args: Any, window: int | None = 1, hidden: int = 256) -> None:
        super().__init__(*args)
        self.window = window
        self.norms = nn.ModuleDict({name: nn.LayerNorm(size) for name, size in self.sizes.items()})
        width = sum(self.sizes.values())
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, self.classes))

    def fuse(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits by frame."""
        frames = batch["frame_mask"].shape[1]
        sounds = _mean_in_windows(batch["sounds"], batch["frame_mask"], self.window or frames)
        words = _mean_in_windows(batch["words"], batch["word_mask"], batch["words"].shape[1])[:, :1]
        parts = {"pictures": batch["pictures"], "sounds": sounds, "words": words.expand(-1, frames, -1)}
        return self.mlp(torch.cat([self.norms[name](part) for name, part in parts.items()], -1))


def _mean_in_windows(values: Tensor, real: Tensor, window: int) -> Tensor:
    """`values (batch, steps, dim)`, each the mean over what is real of the window that it is in."""
    windows = torch.arange(values.shape[1], device=values.device) // window
    together = ((windows[:, None] == windows) & real[:, None]).to(values.dtype)
    return together @ values / together.sum(-1, keepdim=True).clamp(min=1)


class TokenTransformer(LateFusion):
    """A small transformer in which a clip's pictures, sounds and words all attend to each other.

    A picture and the sound of the same frame carry the same learned time code.

    Args:
        width: of its layers.
        layers: how many.
    """

    def __init__(self, examples: Sequence[Example], *args: Any, width: int = 64, layers: int = 2) -> None:
        super().__init__(examples, *args)
        frames = max(len(example["labels"]) for example in examples)
        self.projections = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for name, size in self.sizes.items()}
        )
        self.kind = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in self.sizes})
        self.time = nn.Parameter(0.1 * torch.randn(frames, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.classes))

    def fuse(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits by frame."""
        frames = batch["frame_mask"].shape[1]
        tokens = {name: self.projections[name](batch[name]) + self.kind[name] for name in self.sizes}
        for name in ("pictures", "sounds"):
            tokens[name] = tokens[name] + self.time[:frames]
        real = torch.cat([batch["frame_mask"], batch["frame_mask"], batch["word_mask"]], 1)
        states = self.encoder(torch.cat(list(tokens.values()), 1), src_key_padding_mask=~real)
        return self.out(states[:, :frames])
