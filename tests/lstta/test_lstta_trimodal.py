"""LSTTA in a `TrimodalModel` and its heads, through PEFT's and transformers' own doors."""

import dataclasses

import pytest
import torch
from helpers import ADD_ADAPTER
from lstta_models import CLOSE, EXACT, adapter_parameters, strengthen
from peft import (
    AutoPeftModel,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from trimodal_families import BATCH, FRAMES, IMAGE, SAMPLES, VOCAB, tower

from peft_read import LsttaConfig, TrimodalForFrameClassification, TrimodalForSequenceClassification, TrimodalModel


FAMILIES = {"vision": "vit", "audio": "wav2vec2", "text": "bert"}


def model_of(model_class=TrimodalModel, families=FAMILIES, **options):
    towers = {modality: tower(family) for modality, family in families.items()}
    torch.manual_seed(0)
    return model_class.from_pretrained_towers(**towers, projection_dim=16, **options)


def inputs_of(batch=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(batch, FRAMES, 3, IMAGE, IMAGE, generator=generator),
        "input_values": torch.randn(batch, SAMPLES, generator=generator),
        "input_ids": torch.randint(5, VOCAB, (batch, 9), generator=generator),
        "attention_mask": torch.ones(batch, 9, dtype=torch.long),
    }


def config_of(**options):
    return LsttaConfig(**{"r": 8, "num_heads": 2, "window": 2} | options)


INPUTS = inputs_of()


@torch.no_grad()
def vector(model, inputs=INPUTS):
    output = model(**inputs)
    return output.pooler_output if output.logits is None else output.logits


def test_new_adapters_change_nothing():
    """Bit for bit, through the fused vector."""
    wanted = vector(model_of())
    model = get_peft_model(model_of(), config_of()).eval()
    torch.testing.assert_close(vector(model), wanted, **EXACT)
    assert (vector(strengthen(model)) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(vector(model.unload()), wanted, **EXACT)


def test_base_and_adapter_are_saved_and_loaded(tmp_path):
    """The base model in one folder, the adapter and the head in another."""
    base = model_of(TrimodalForSequenceClassification, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_of(task_type=TaskType.SEQ_CLS, modules_to_save=["fusion"])).eval()
    strengthen(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(part in {"lstta_adapter", "fusion", "classifier"} for key in tensors for part in [_part(key)])
    again = TrimodalForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(vector(loaded), vector(model), **EXACT)


def _part(key):
    return next(part for part in key.split(".") if part in ("lstta_adapter", "fusion", "classifier"))


def test_load_adapter(tmp_path):
    """transformers' own loads what PEFT saved."""
    model = get_peft_model(model_of(), config_of())
    wanted = vector(strengthen(model).eval())
    model.save_pretrained(tmp_path)
    other = model_of()
    other.load_adapter(tmp_path, adapter_name="yours")
    torch.testing.assert_close(vector(other.eval()), wanted, **EXACT)


@ADD_ADAPTER
def test_transformers_own_adapters(tmp_path):
    """`add_adapter`, `save_pretrained` and `load_adapter` of a model of transformers, without a `PeftModel`."""
    model = model_of()
    model.add_adapter(config_of(), adapter_name="mine")
    strengthen(model, "mine")
    wanted = vector(model.eval())
    model.save_pretrained(tmp_path)
    other = model_of()
    plain = vector(other)
    other.load_adapter(tmp_path, adapter_name="yours")
    torch.testing.assert_close(vector(other.eval()), wanted, **EXACT)
    other.disable_adapters()
    torch.testing.assert_close(vector(other), plain, **EXACT)
    other.enable_adapters()
    other.delete_adapter("yours")
    torch.testing.assert_close(vector(other), plain, **EXACT)


def test_importance_of_tubelets():
    """A tower that joins two frames judges them together."""
    model = get_peft_model(model_of(families=FAMILIES | {"vision": "videomae"}), config_of()).eval()
    vector(model, INPUTS | {"frame_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])})
    importance = model.get_frame_importance()
    assert [tuple(g.shape) for g in importance] == [(BATCH, FRAMES // 2)] * 4
    assert all(g[0, 1] == 0 and g[1, 1] > 0 for g in importance)


def test_labels_of_frames():
    """The head for frames learns what only sound and text tell: a frame's label depends on them."""
    model = get_peft_model(
        model_of(TrimodalForFrameClassification, num_labels=2), config_of(modules_to_save=["fusion", "classifier"])
    ).train()
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (BATCH, FRAMES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(15):
        loss = model(**INPUTS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Clips(Dataset):
    """A few random clips with labels."""

    def __init__(self):
        self.inputs = inputs_of(batch=6)
        self.labels = torch.arange(6) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {name: value[i] for name, value in self.inputs.items()} | {"labels": self.labels[i]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    """The Trainer trains, saves the adapter alone, and goes on where it stopped."""
    base = model_of(TrimodalForSequenceClassification, num_labels=3)
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, config_of(task_type=TaskType.SEQ_CLS, modules_to_save=["fusion"]))
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 2,
        "seed": 0,
    }
    if checkpointing:
        renamed = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
        arguments["activation_checkpointing" if renamed else "gradient_checkpointing"] = True
    result = Trainer(model, TrainingArguments(max_steps=2, **arguments), train_dataset=Clips()).train()
    assert result.global_step == 2
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    for name, p in model.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in frozen and "fusion" not in name and "classifier" not in name:
            assert torch.equal(p, frozen[plain]), name
    assert any(p.abs().max() > 0 for name, p in adapter_parameters(model).items() if "upward" in name)
    trainer = Trainer(model, TrainingArguments(max_steps=4, **arguments), train_dataset=Clips())
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_the_composite(use_reentrant):
    """The composite's own switch: the same gradients."""
    gradients = []
    for checkpointed in (False, True):
        model = strengthen(get_peft_model(model_of(families=FAMILIES | {"vision": "swin"}), config_of())).train()
        if checkpointed:
            name = "activation_checkpointing_enable"
            enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**INPUTS).pooler_output.square().sum().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("head", [TrimodalForSequenceClassification, TrimodalForFrameClassification])
def test_an_adapter_per_sample_with_modules_of_its_own(head):
    """Fusion and classifier of each sample's own adapter, as that adapter alone gives them, and the base's own."""
    options = {"modules_to_save": ["classifier", "fusion"]}
    model = get_peft_model(model_of(head, num_labels=3), config_of(**options)).eval()
    model.add_adapter("second", config_of(**options))
    for name, seed in (("default", 0), ("second", 1)):
        strengthen(model, name, seed)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f"modules_to_save.{name}." in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    names = ["second", "__base__", "default", "second"]
    inputs = inputs_of(batch=4)
    mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(**inputs).logits
        else:
            model.set_adapter(name)
            alone = model(**inputs).logits
        torch.testing.assert_close(mixed[row], alone[row], **CLOSE)
        other = names[row - 1]
        assert name == other or (mixed[row] - mixed[row - 1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="one adapter per sample"):
        model(**inputs, adapter_names=names[:3])


@pytest.mark.parametrize(
    ("head", "task", "auto"),
    [
        (TrimodalForSequenceClassification, TaskType.SEQ_CLS, AutoPeftModelForSequenceClassification),
        (TrimodalForSequenceClassification, None, AutoPeftModel),
        (TrimodalForFrameClassification, TaskType.TOKEN_CLS, AutoPeftModelForTokenClassification),
        (TrimodalForFrameClassification, None, AutoPeftModel),
        (TrimodalModel, TaskType.FEATURE_EXTRACTION, AutoPeftModelForFeatureExtraction),
        (TrimodalModel, None, AutoPeftModel),
    ],
)
def test_auto_classes_load_base_and_adapter(head, task, auto, tmp_path):
    """From the adapter's folder alone, which names the base's, with or without a task."""
    base = model_of(head, **({} if head is TrimodalModel else {"num_labels": 3}))
    base.save_pretrained(tmp_path / "base")
    model = strengthen(get_peft_model(head.from_pretrained(tmp_path / "base"), config_of(task_type=task))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.get_base_model()) is head
    torch.testing.assert_close(vector(loaded), vector(model), **EXACT)
