"""What the examples share: reading data folders, writing results, real images and a text encoder, training."""

from .beside_torch import import_torchvision


import_torchvision()  # before anything brings in transformers, which tries too
