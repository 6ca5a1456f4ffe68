"""Tokens that stand for pictures, compared with the pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import ProcessorMixin


# Attributes of a processor that say how many tokens a frame has, at least.
PER_FRAME = ("image_seq_length", "image_seq_len")


def check_placeholders(processor: ProcessorMixin, batch: dict[str, Tensor], frames: Sequence[int]) -> None:
    """Compare the placeholders of each row with what its frames will give, before a model runs.

    Args:
        processor: what made the batch.
        batch: one video a row.
        frames: of each row's video.

    Raises:
        ValueError: if a row has another number of them, or none.
    """
    found, expected = count_placeholders(processor, batch).tolist(), _expected(processor, batch, frames)
    each = next((n for name in PER_FRAME if isinstance(n := getattr(processor, name, None), int)), 1)
    least_by_row = [each * count for count in frames] if expected is None else expected
    for row, (tokens, least) in enumerate(zip(found, least_by_row, strict=True)):
        if tokens < least or (expected is not None and tokens != least):
            raise ValueError(
                f"Row {row} has {tokens} tokens in the place of pictures, but its {frames[row]} frames give "
                f"{'at least ' if expected is None else ''}{least}: the processor's chat template and its sizes don't "
                "fit each other, or the template doesn't know the content {'type': 'video'}."
            )


def count_placeholders(processor: ProcessorMixin, batch: dict[str, Tensor]) -> Tensor:
    """How many tokens of each row stand for pictures, `(batch,)`."""
    # The tokenizer's come first: Gemma 3's processor takes the token before an image for the image's.
    owners = (processor.tokenizer, processor)
    by_kind = [[getattr(owner, f"{kind}_token_id", None) for owner in owners] for kind in ("video", "image")]
    ids = {next((token for token in of_kind if isinstance(token, int)), None) for of_kind in by_kind}
    known = torch.tensor(sorted(token for token in ids if token is not None))
    return torch.isin(batch["input_ids"], known).sum(1)


def _expected(processor: ProcessorMixin, batch: dict[str, Tensor], frames: Sequence[int]) -> list[int] | None:
    """By the grid of patches of each video, or of each frame as an image; None where the processor gives none."""
    kind = "video" if "video_grid_thw" in batch else "image"
    grid = batch.get(f"{kind}_grid_thw")
    if grid is None:
        return None
    merged = batch.get(f"{kind}_merge_sizes")
    if merged is None:
        merged = torch.tensor(getattr(processor, f"{kind}_processor").merge_size)
    features = grid.prod(1) // merged**2
    dropped = batch.get(f"{kind}_compression_mask")  # patches like those of the frame before are left out
    if dropped is not None:
        features = torch.stack([kept.sum() for kept in dropped.split(features.tolist())])
    rows = [1] * len(frames) if kind == "video" else list(frames)
    return [int(part.sum()) for part in features.split(rows)]
