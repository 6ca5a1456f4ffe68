"""Labels of clips and of frames: losses, predictions, heads on saved models, and transformers' Trainer."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments
from trimodal_families import BATCH, FRAMES
from trimodal_models import fused, inputs_of, model_of

from peft_read import TrimodalConfig, TrimodalForFrameClassification, TrimodalForSequenceClassification, TrimodalModel
from peft_read.trimodal.losses import classification_loss


# Some DeBERTa's code is scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize(
    ("labels", "problem_type", "expected"),
    [
        (torch.tensor([2, 0]), None, lambda x, y: nn.functional.cross_entropy(x, y)),
        (torch.tensor([2, -100]), None, lambda x, y: nn.functional.cross_entropy(x[:1], y[:1])),
        (torch.eye(3)[:2], None, lambda x, y: nn.functional.binary_cross_entropy_with_logits(x, y)),
        (torch.randn(2, 3), "regression", lambda x, y: nn.functional.mse_loss(x, y)),
    ],
)
def test_losses_of_samples(labels, problem_type, expected):
    model = model_of(cls=TrimodalForSequenceClassification, num_labels=3, problem_type=problem_type)
    outputs = model(**inputs_of(), labels=labels)
    assert outputs.logits.shape == (BATCH, 3)
    torch.testing.assert_close(outputs.loss, expected(outputs.logits, labels))


@pytest.mark.parametrize("names", [("vit", "ast", "bert"), ("videomae", "bert"), ("vivit", "wav2vec2")], ids="-".join)
def test_losses_of_frames(names):
    """Frames that are padding, or labelled -100, count for nothing."""
    model = model_of(names, cls=TrimodalForFrameClassification, num_labels=3)
    frame_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[0, -100, 1, 2], [2, 1, 0, 0]])
    outputs = model(**inputs_of(names), frame_mask=frame_mask, labels=labels)
    assert outputs.logits.shape == (BATCH, FRAMES, 3)
    real = (frame_mask == 1) & (labels != -100)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits[real], labels[real]))
    assert torch.equal(outputs.logits[0, 0], outputs.logits[0, 1]) == (names[0] in ("videomae", "vivit"))


def test_saliency_of_frames():
    model = model_of(cls=TrimodalForFrameClassification, num_labels=1)
    saliency = torch.rand(BATCH, FRAMES)
    saliency[0, 1] = -100
    outputs = model(**inputs_of(), labels=saliency, frame_mask=torch.ones(BATCH, FRAMES))
    real = saliency >= 0
    torch.testing.assert_close(outputs.loss, nn.functional.mse_loss(outputs.logits[..., 0][real], saliency[real]))


def test_a_frame_is_seen_in_its_own_label():
    """And a frame's picture in no other frame's, without adapters."""
    model = model_of(cls=TrimodalForFrameClassification, num_labels=3)
    inputs = inputs_of()
    with torch.no_grad():
        before = model(**inputs).logits
        inputs["pixel_values"][0, 2] += 1
        changed = (model(**inputs).logits != before).any(-1)
    assert changed.tolist() == [[False, False, True, False], [False] * 4]


def test_frames_need_pictures():
    with pytest.raises(ValueError, match="needs a vision tower"):
        model_of(("ast", "bert"), cls=TrimodalForFrameClassification)
    inputs = inputs_of()
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="no frames to classify"):
        model_of(cls=TrimodalForFrameClassification)(**inputs)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must have the shape \(2, 3\), got \(2, 2\)"):
        classification_loss(torch.zeros(2, 3), torch.zeros(2, 2))
    assert classification_loss(torch.ones(2, 3), torch.tensor([-100, -100])) == 0


def test_the_auto_classes_know_it(tmp_path):
    model = model_of(cls=TrimodalForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TrimodalConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is TrimodalModel
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is TrimodalForSequenceClassification
    assert torch.equal(loaded(**inputs_of()).logits, model(**inputs_of()).logits)
    with pytest.raises(ValueError, match="has to say its `model_type`"):
        TrimodalConfig(text_config={"hidden_size": 3})


def test_a_head_is_put_on_a_saved_model(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    headed = TrimodalForFrameClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(fused(headed, **inputs_of()), fused(model, **inputs_of()))
    assert headed.classifier.out_features == 5


def test_trainer_and_peft(tmp_path):
    """LoRA in the towers and a head through PEFT and transformers' Trainer: loss and predictions as expected."""
    model = model_of(cls=TrimodalForSequenceClassification, num_labels=3)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    adapted = peft.get_peft_model(model, lora)
    inputs = inputs_of()
    data = [{k: v[i] for k, v in inputs.items()} | {"labels": i} for i in range(BATCH)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(adapted, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    predictions = trainer.predict(data)
    assert predictions.predictions.shape == (BATCH, 3)
    assert torch.isfinite(torch.tensor(predictions.metrics["test_loss"]))
    adapted.save_pretrained(tmp_path / "adapter")
