"""Parts of the example that fine-tunes a video language model."""

from common.beside_torch import import_torchvision


import_torchvision()  # before transformers tries
