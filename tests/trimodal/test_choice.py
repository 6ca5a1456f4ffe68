"""Multiple choice: every choice meets the clip by itself, and those that a sample doesn't have can't be chosen."""

import pytest
import torch
from lstta_models import strengthen
from peft import PeftModel, get_peft_model
from transformers import AutoModelForMultipleChoice, Trainer, TrainingArguments
from trimodal_families import FAMILIES, VOCAB, frame_inputs, sound_inputs, tower

from peft_read import LsttaConfig, TrimodalForMultipleChoice


NAMES = ("vit", "ast", "bert")
FAMILIES_THAT_FIT = [NAMES, ("videomae", "wav2vec2", "t5"), ("swin", "clap_audio", "gpt2")]


def model_of(names=NAMES, adapt=True):
    towers = {FAMILIES[name].modality: tower(name) for name in names}
    torch.manual_seed(0)
    base = TrimodalForMultipleChoice.from_pretrained_towers(**towers, projection_dim=16)
    if not adapt:
        return base
    return strengthen(get_peft_model(base, LsttaConfig(r=8, num_heads=2, modules_to_save=list(base.new_parts)))).eval()


def inputs_of(names=NAMES):
    """Three choices, of which one has padding; the second sample has but two."""
    ids = torch.randint(5, VOCAB, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 0, 4:], mask[1, 2] = 0, 0
    clips = frame_inputs() | sound_inputs(names[1])
    return clips | {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("names", FAMILIES_THAT_FIT, ids="-".join)
@torch.no_grad()
def test_each_choice_is_as_it_is_alone(names, tmp_path):
    model, inputs = model_of(names), inputs_of(names)
    output = model(**inputs)
    assert output.logits.shape == (2, 3)
    assert output.logits[1, 2] == -torch.inf
    for row, choice in ((0, 0), (0, 2), (1, 1)):
        real = inputs["attention_mask"][row, choice].sum()
        text = {k: inputs[k][row : row + 1, choice : choice + 1, :real] for k in ("input_ids", "attention_mask")}
        clip = {k: v[row : row + 1] for k, v in inputs.items() if k not in (*text, "labels")}
        alone = model(**clip, **text).logits[0, 0]
        torch.testing.assert_close(alone, output.logits[row, choice], rtol=1e-4, atol=1e-4)
    shares = output.logits.double().softmax(1)
    torch.testing.assert_close(output.loss.double(), -(shares[0, 0].log() + shares[1, 1].log()) / 2)
    base = model.get_base_model()
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    base.save_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(
        TrimodalForMultipleChoice.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(loaded.eval()(**inputs).logits, output.logits)


def test_its_trainer(tmp_path):
    model, inputs = model_of(), inputs_of()
    data = [{k: v[i] for k, v in inputs.items()} for i in range(2)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(data).predictions.shape == (2, 3)
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: multiple-choice\n" in card
    assert "num_labels" not in card


def test_choices_are_an_axis():
    model, inputs = model_of(adapt=False), inputs_of()
    flat = {k: v[:, 0] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=r"Give the choices as an axis of the text.*got \(2, 7\)"):
        model(**flat)
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(batch, choices, words\) = \(2, 3, 7\)"):
        model(**inputs | {"attention_mask": inputs["attention_mask"][:, 0]})
    with pytest.raises(ValueError, match="needs a text tower"):
        TrimodalForMultipleChoice.from_pretrained_towers(tower("vit"), tower("ast"))


def test_the_auto_class_knows_it(tmp_path):
    model_of(adapt=False).save_pretrained(tmp_path)
    assert type(AutoModelForMultipleChoice.from_pretrained(tmp_path)) is TrimodalForMultipleChoice
