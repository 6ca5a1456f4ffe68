"""What becomes one vector: frames by their importance, features from disk, and samples that lose a modality."""

import pytest
import torch
from lstta_models import strengthen
from peft import PeftModel, get_peft_model
from transformers import AutoModel
from trimodal_families import BATCH, FRAMES, frame_inputs, sound_inputs, text_inputs, tower

from peft_read import (
    FeatureTower,
    FeatureTowerConfig,
    LsttaConfig,
    TrimodalConfig,
    TrimodalForFrameClassification,
    TrimodalForSequenceClassification,
    TrimodalModel,
)
from peft_read.trimodal.fusion import masked_mean
from peft_read.trimodal.inputs import TrimodalInputs, drop_modalities


SIZE = 12


def model_of(cls=TrimodalModel, vision="vit", **config):
    torch.manual_seed(0)
    towers = tower(vision), tower("ast"), tower("bert")
    return cls.from_pretrained_towers(*towers, **{"projection_dim": 16} | config).eval()


def adapted(base, **options):
    return strengthen(get_peft_model(base, LsttaConfig(**{"r": 8, "num_heads": 2} | options))).eval()


def inputs_of(batch=BATCH):
    return frame_inputs(batch) | sound_inputs("ast", batch) | text_inputs(batch)


@torch.no_grad()
def test_a_weighted_mean_by_hand():
    values, weights = torch.randn(2, 3, 4), torch.tensor([[1.0, 3.0, 7.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    values[0, 2] = torch.nan
    mean = masked_mean(values, mask, weights)
    torch.testing.assert_close(mean[0], values[0, 0] / 4 + values[0, 1] * 3 / 4)
    assert torch.equal(mean[1], torch.zeros(4))


@pytest.mark.parametrize("form", ["gate", "choice"])
@pytest.mark.parametrize("vision", ["vit", "videomae"])
@torch.no_grad()
def test_pooling_by_importance_by_hand(vision, form):
    """Frames, or tubelets, count by the last level's importance; what is fused of sound and words stays."""
    model = adapted(model_of(vision=vision, pooling="importance"), filter_form=form)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    output = model(**inputs_of(), frame_mask=mask)
    base, importance = model.get_base_model(), model.get_frame_importance()[-1]
    steps = importance.shape[1]
    states = output.vision_model_output.last_hidden_state.reshape(BATCH, steps, -1, 32).mean(2)
    if vision == "videomae":
        assert steps == FRAMES // 2
    seen = (states * importance[..., None]).sum(1) / importance.sum(1, keepdim=True)
    vectors = {
        "vision": seen,
        "audio": output.audio_model_output.last_hidden_state[:, 2:].mean(1),
        "text": output.text_model_output.last_hidden_state.mean(1),
    }
    expected = base.fusion(vectors, dict.fromkeys(vectors))
    torch.testing.assert_close(output.pooler_output, expected, rtol=1e-4, atol=1e-5)
    base.config.pooling = "mean"
    assert (model(**inputs_of(), frame_mask=mask).pooler_output - expected).abs().max() > 1e-3


@torch.no_grad()
def test_without_a_filter_pooling_by_importance_is_the_mean():
    plain, weighed = model_of(), model_of(pooling="importance")
    assert torch.equal(plain(**inputs_of()).pooler_output, weighed(**inputs_of()).pooler_output)
    plain, weighed = adapted(plain, frame_filter=False), adapted(weighed, frame_filter=False)
    assert torch.equal(plain(**inputs_of()).pooler_output, weighed(**inputs_of()).pooler_output)


def test_what_is_pooled_teaches_the_filter():
    """Of the last level, too, whose importance nothing after it would use."""
    model = get_peft_model(model_of(pooling="importance"), LsttaConfig(r=8, num_heads=2, filter_form="choice"))
    model(**inputs_of()).pooler_output.square().sum().backward()
    last = [p.grad for n, p in model.named_parameters() if "layers.3" in n and "judge.scorer.weight" in n]
    assert last
    assert all(gradient.abs().max() > 0 for gradient in last)


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`pooling` must be one of 'mean', 'importance', got 'max'"):
        TrimodalConfig(pooling="max")
    with pytest.raises(ValueError, match=r"`modality_dropout` must be at least 0 and below 1, got 1\.5"):
        TrimodalConfig(modality_dropout=1.5)
    with pytest.raises(ValueError, match="`filter_form` must be 'gate' or 'choice'"):
        LsttaConfig(filter_form="sum")
    model_of(pooling="importance", modality_dropout=0.25).save_pretrained(tmp_path)
    config = TrimodalModel.from_pretrained(tmp_path).config
    assert (config.pooling, config.modality_dropout) == ("importance", 0.25)


def test_modalities_are_lost_at_random():
    """As often as asked, never all of a sample, never a needed one; what a sample hasn't got doesn't save another."""
    model = model_of()
    big = {k: v[:1].expand(4000, *v.shape[1:]) for k, v in inputs_of().items()}
    _, batch = TrimodalInputs(**big, frame_mask=(torch.arange(4000) % 2)[:, None].expand(-1, FRAMES)).described(
        model.towers()
    )
    torch.manual_seed(0)
    drop_modalities(batch, 0.5, ("text",))
    there = {m: part.mask.any(1) for m, part in batch.towers.items() if part.mask is not None}
    assert there["text"].all()
    assert there["audio"].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert there["vision"][::2].sum() == 0
    assert there["vision"][1::2].float().mean().item() == pytest.approx(0.5, abs=0.05)
    _, batch = TrimodalInputs(**big).described(model.towers())
    drop_modalities(batch, 0.9, ())
    left = torch.stack([part.mask.any(1) for part in batch.towers.values()]).sum(0)
    assert left.min() >= 1
    assert set(left.tolist()) == {1, 2, 3}


@torch.no_grad()
def test_a_lost_modality_is_a_missing_one_and_only_in_training(monkeypatch):
    model = adapted(model_of(TrimodalForSequenceClassification, modality_dropout=0.5, num_labels=3))
    inputs = inputs_of()
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    draws = iter([[0.9, 0.1], [0.9, 0.9], [0.9, 0.9]])  # the second sample loses its pictures
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(draws)))
    got = model.train()(**inputs).logits
    model.eval()
    without = model(**inputs, frame_mask=torch.tensor([[1] * FRAMES, [0] * FRAMES])).logits
    torch.testing.assert_close(got, without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (got[1] - expected[1]).abs().max() > 1e-3


def features_of(frames=FRAMES, seed=0):
    return torch.randn(BATCH, frames, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_features_take_the_place_of_towers(tmp_path):
    """All three: unadapted they are what was on disk; adapted they meet; saved, loaded, and named in the card."""
    options = {"num_hidden_layers": 2}
    base = TrimodalForFrameClassification.from_pretrained_towers(
        vision=FeatureTower.of("vision", SIZE, **options),
        audio=FeatureTower.of("audio", SIZE, **options, hidden_size=16),
        text=FeatureTower.of("text", SIZE, **options),
        projection_dim=16,
    )
    inputs = {"frame_features": features_of(), "input_features": features_of(6, 1), "inputs_embeds": features_of(5, 2)}
    mask = {"frame_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    output = base(**inputs, **mask)
    torch.testing.assert_close(output.vision_model_output[0][1], inputs["frame_features"][1])
    assert output.audio_model_output[0].shape == (BATCH, 6, 16)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, modules_to_save=["fusion", "classifier", "projector"])
    logits = model(**inputs, **mask).logits
    assert logits.shape == (BATCH, FRAMES, 2)
    spoilt = {name: value.clone() for name, value in inputs.items()}
    spoilt["frame_features"][0, 3] = torch.nan
    torch.testing.assert_close(model(**spoilt, **mask).logits[0, :3], logits[0, :3])
    other = model(**inputs | {"input_features": features_of(6, 5)}, **mask)
    assert (other.vision_model_output[0] - model(**inputs, **mask).vision_model_output[0]).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f'vision=peft_read.FeatureTower.of("vision", {SIZE}, num_hidden_layers=2),' in card
    assert f'audio=peft_read.FeatureTower.of("audio", {SIZE}, num_hidden_layers=2, hidden_size=16),' in card
    loaded = TrimodalForFrameClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs, **mask).logits, logits)
    assert type(AutoModel.from_pretrained(tmp_path / "base").vision_model) is FeatureTower


def test_features_of_another_kind_are_refused():
    model = TrimodalModel.from_pretrained_towers(vision=FeatureTower.of("vision", SIZE), text=tower("bert"))
    with pytest.raises(ValueError, match=rf"takes `frame_features` \(batch, steps, {SIZE}\), got \(2, 4, 3\)"):
        model(frame_features=torch.zeros(2, 4, 3), **text_inputs())
    with pytest.raises(ValueError, match="takes `frame_features`, not `pixel_values`"):
        model(**frame_inputs(), **text_inputs())
    with pytest.raises(ValueError, match="`modality` must be 'vision', 'audio' or 'text'"):
        FeatureTowerConfig(modality="smell")
    with pytest.raises(ValueError, match="`feature_size` must be positive"):
        FeatureTower.of("audio", 0)
