"""A look at all samples before training: how long they are, and whether all of each fits."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from .collator import VlmCollator
from .data import Sample


def survey(collator: VlmCollator, samples: Sequence[Sample], max_tokens: int | None = None) -> list[Sample]:
    """Make each sample once, print how long they are, and leave out those that are too long.

    Args:
        collator: what will make them.
        samples: of one split.
        max_tokens: those with more are left out, and counted; nothing is ever cut off.

    Returns:
        The rest.

    Raises:
        SystemExit: if nothing is left.
    """
    kept, tokens, pictures = [], [], set()
    split = samples[0].split
    for sample in tqdm(samples, desc=f"look at {split} videos", leave=False):
        batch = collator([sample])
        length = int(batch["attention_mask"].sum())
        if max_tokens is None or length <= max_tokens:
            kept.append(sample)
            tokens.append(length)
            frames = collator.video(sample)[0].shape
            pictures.add((frames[0], frames[1], frames[2]))
    if not kept:
        raise SystemExit(f"All {len(samples)} {split} samples have more than --max_tokens {max_tokens} tokens.")
    left_out = f"; {len(samples) - len(kept)} longer ones left out" if len(kept) < len(samples) else ""
    longest = max(pictures, key=lambda shape: (shape[0] * shape[1] * shape[2], shape))
    print(
        f"{split}: {len(kept)} samples, {max(tokens)} tokens at most and {sum(tokens) / len(tokens):.0f} on average, "
        f"{longest[0]} frames of {longest[2]}x{longest[1]} at most{left_out}",
        flush=True,
    )
    return kept
