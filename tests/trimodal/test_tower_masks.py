"""What sound towers are given of a padded batch: a mask over their input where they were pretrained with one."""

import pytest
import torch
from trimodal_families import FAMILIES, SOUNDS, tower

from peft_read.trimodal.towers import sound_steps, tower_inputs


def masked(family):
    """A tower, and what it is called with where the second sound is half as long as the first."""
    model = tower(family)
    sound = torch.randn(2, *SOUNDS[FAMILIES[family].inputs][1])
    steps = sound_steps(model, sound)
    return model, tower_inputs(model, sound, torch.arange(steps) < torch.tensor([[steps], [steps // 2]]))


def test_a_spectrogram_transformer_hears_silence():
    """Its own `attention_mask` is over patches; it was pretrained without, on sounds filled up to one length."""
    model, inputs = masked("ast")
    assert "attention_mask" not in inputs
    assert model(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("family", ["wav2vec2_conformer", "wav2vec2_bert", "moonshine"])
def test_others_get_the_mask(family):
    model, inputs = masked(family)
    steps = inputs["attention_mask"].shape[1]
    assert inputs["attention_mask"].sum(1).tolist() == [steps, steps // 2]
    assert model(**inputs).last_hidden_state.isfinite().all()
