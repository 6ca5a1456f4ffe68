"""Clips and sentences apart: one call for each, a loss that is symmetric, and LSTTA between what is seen and heard."""

import pytest
import torch
from lstta_models import strengthen
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from trimodal_families import FAMILIES, frame_inputs, sound_inputs, text_inputs, tower

from peft_read import LsttaConfig, TrimodalForRetrieval


NAMES = ("vit", "ast", "bert")
FAMILIES_THAT_FIT = [
    NAMES,
    ("videomae", "wav2vec2", "t5"),
    ("swin", "clap_audio", "gpt2"),
    ("clip_vision", "whisper", "clip_text"),
    ("vivit", "qwen2_audio", "llama"),
]


def model_of(names=NAMES, **config):
    towers = {FAMILIES[name].modality: tower(name) for name in names}
    torch.manual_seed(0)
    return TrimodalForRetrieval.from_pretrained_towers(**towers, **{"projection_dim": 16} | config).eval()


def adapted(base):
    config = LsttaConfig(r=8, num_heads=2, modules_to_save=list(base.new_parts))
    return strengthen(get_peft_model(base, config)).eval()


def inputs_of(names=NAMES, batch=2):
    text = text_inputs(batch)
    text["attention_mask"][1, 6:] = 0
    return frame_inputs(batch), sound_inputs(names[1], batch), text


def loss_by_hand(sentences, clips, scale):
    """The mean of two negative log shares, of each pair among its row and among its column."""
    scores = scale * sentences @ clips.T
    shares = [scores.exp() / scores.exp().sum(axis, keepdim=True) for axis in (0, 1)]
    return -sum(share.diagonal().log().mean() for share in shares) / 2


@pytest.mark.parametrize("names", FAMILIES_THAT_FIT, ids="-".join)
@torch.no_grad()
def test_clips_and_sentences_apart(names, tmp_path):
    """Embeddings by one call each are those that the loss compares, adapted or not; saved and loaded."""
    base = model_of(names)
    frames, sound, text = inputs_of(names)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    scale = model.get_base_model().similarity.logit_scale.exp()
    clips, sentences = model.get_clip_features(**frames, **sound), model.get_text_features(**text)
    torch.testing.assert_close(clips.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(sentences.norm(dim=-1), torch.ones(2))
    output = model(**frames, **sound, **text)
    torch.testing.assert_close(output.logits, scale * sentences @ clips.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, loss_by_hand(sentences, clips, scale), rtol=1e-4, atol=1e-4)
    # Pictures meet sound. A sentence is what its tower makes of it alone, and clips don't depend on it.
    with model.disable_adapter():
        unadapted = model(**frames, **sound, **text)
    assert (output.vision_model_output[0] - unadapted.vision_model_output[0]).abs().max() > 1e-3
    torch.testing.assert_close(output.text_model_output[0], unadapted.text_model_output[0], rtol=0, atol=0)
    other = model(**frames, **sound, **text | {"input_ids": text["input_ids"] + 1})
    torch.testing.assert_close(other.vision_model_output[0], output.vision_model_output[0], rtol=0, atol=0)
    model.save_pretrained(tmp_path / "adapter")
    loaded = TrimodalForRetrieval.from_pretrained(tmp_path / "base").requires_grad_(False)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**frames, **sound, **text).logits, output.logits)


def test_its_loss_trains_by_the_trainer(tmp_path):
    model, (frames, sound, text) = adapted(model_of()), inputs_of(batch=4)
    data = [{k: v[i] for k, v in (frames | sound | text).items()} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        learning_rate=3e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        label_names=[],
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    model(**frames, **sound, **text).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: feature-extraction\n" in card
    assert "peft_read.TrimodalForRetrieval.from_pretrained_towers(" in card


def test_what_cannot_be_is_refused():
    frames, _, text = inputs_of()
    model = model_of()
    with pytest.raises(ValueError, match="Give a sentence for each clip, got 2 clips and 1 sentences"):
        model(**frames, **{k: v[:1] for k, v in text.items()})
    with pytest.raises(ValueError, match="got nothing"):
        model(**text)
    with pytest.raises(ValueError, match="needs a text tower"):
        model_of(("vit", "ast"))
    with pytest.raises(ValueError, match=r"two or three towers that meet.* has vision of `vision_model` and `audio_m"):
        adapted(model_of(("vit", "bert")))
