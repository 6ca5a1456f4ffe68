"""Trimodal models of tiny towers, and what they are called with."""

import torch
from trimodal_families import FAMILIES, frame_inputs, sound_inputs, text_inputs, tower

from peft_read import TrimodalModel


NAMES = ("vit", "ast", "bert")
DIM = 16


def model_of(names=NAMES, cls=TrimodalModel, **config):
    towers = {FAMILIES[name].modality: tower(name) for name in names}
    torch.manual_seed(0)
    return cls.from_pretrained_towers(**towers, **{"projection_dim": DIM} | config)


def inputs_of(names=NAMES, **batch):
    inputs = {}
    for name in names:
        make = {"vision": frame_inputs, "audio": lambda **kw: sound_inputs(name, **kw), "text": text_inputs}  # noqa: B023
        inputs |= make[FAMILIES[name].modality](**batch)
    return inputs


@torch.no_grad()
def fused(model, **inputs):
    return model(**inputs).pooler_output
