"""What LSTTA would do wrong without a word: it warns, refuses, or does it right."""

import copy
import warnings

import pytest
import torch
from lstta_models import Composite, adapted, batch_of, strengthen
from peft import get_peft_model
from trimodal_families import VOCAB, frame_inputs, sound_inputs, text_inputs, tower

from peft_read import LsttaConfig, TrimodalForSequenceClassification


class Forgetful(Composite):
    """Calls its towers by itself."""

    def forward(self, pixel_values, input_ids, attention_mask):
        seen = self.vision_model(pixel_values.flatten(0, 1)).last_hidden_state
        return self.classifier(
            seen.mean((0, 1)) + self.text_model(input_ids, attention_mask).last_hidden_state.mean(1)
        )


@torch.no_grad()
def test_a_composite_that_forgets_run_towers_is_told_once():
    inputs = batch_of(("vit", "bert"))
    model = get_peft_model(Forgetful(vision=tower("vit"), text=tower("bert")), LsttaConfig(r=8, num_heads=2))
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            model(**inputs)
    with pytest.warns(UserWarning, match="LSTTA did nothing in the forward of this Forgetful.*run_towers"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
        # One that remembers is never told.
        right = adapted(("vit", "bert"))
        right(**inputs)
        right(**inputs)
    with pytest.warns(UserWarning, match="LSTTA did nothing"):
        other(**inputs)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@torch.no_grad()
def test_later_words_do_not_reach_earlier_ones_of_a_causal_model(family):
    """It is told what the others find, and tells them nothing; those of an encoder do reach each other."""
    for name, reaches in ((family, False), ("bert", True)):
        model = adapted(("vit", "wav2vec2", name), window=2)
        inputs = batch_of(("vit", "wav2vec2", name))
        before = model(**inputs)["text"].last_hidden_state
        changed = dict(inputs, input_ids=inputs["input_ids"].clone())
        changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 7) % VOCAB
        after = model(**changed)["text"].last_hidden_state
        assert ((after - before)[:, :-1].abs().max() > 1e-4) == reaches
        seen = model(**inputs | {"pixel_values": inputs["pixel_values"] + 1})["text"].last_hidden_state
        assert (seen - before).abs().max() > 1e-3
        pictures = [model(**each)["vision"].last_hidden_state for each in (inputs, changed)]
        assert ((pictures[0] - pictures[1]).abs().max() > 1e-4) == reaches


def test_layerdrop_of_a_composite_is_told():
    speech = tower("wav2vec2")
    speech.config.layerdrop = 0.1
    with pytest.warns(UserWarning, match="audio tower leaves out blocks at random in training"):
        get_peft_model(Composite(audio=speech, text=tower("bert")), LsttaConfig(r=8, num_heads=2))


@torch.no_grad()
def test_a_chosen_frame_always_counts():
    """As a choice, some frame of each clip counts fully, and all do before training; as a gate, none need to."""
    torch.manual_seed(0)
    base = TrimodalForSequenceClassification.from_pretrained_towers(tower("vit"), tower("ast"), tower("bert"))
    inputs = frame_inputs() | sound_inputs("ast") | text_inputs()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model = get_peft_model(base, LsttaConfig(r=8, num_heads=2, filter_form="choice")).eval()
    model(**inputs, frame_mask=mask)
    assert all(torch.equal(level, mask.float()) for level in model.get_frame_importance())
    strengthen(model)
    for judge in (module for name, module in model.named_modules() if name.endswith(".judge")):
        judge.scorer.bias.fill_(-50.0)
        judge.scorer.weight.mul_(30)
    model(**inputs, frame_mask=mask)
    for level in model.get_frame_importance():
        assert torch.equal(level.amax(1), torch.ones(2))
        assert level.min() == 0
        assert not level[1, 2:].any()


def test_closed_gates_have_finite_gradients():
    """All frames of all clips as good as suppressed: what is pooled by their shares still trains."""
    torch.manual_seed(0)
    towers = tower("vit"), tower("ast"), tower("bert")
    base = TrimodalForSequenceClassification.from_pretrained_towers(*towers, pooling="importance")
    model = strengthen(get_peft_model(base, LsttaConfig(r=8, num_heads=2, window=2)))
    for judge in (module for name, module in model.named_modules() if name.endswith(".judge")):
        torch.nn.init.constant_(judge.scorer.bias, -500.0)
    inputs = frame_inputs() | sound_inputs("ast") | text_inputs()
    loss = model(**inputs, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
