"""Adapters of two methods in one model: LoRA or READ inside of towers, and LSTTA between these."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from fresh import run_code
from peft import LoraConfig, PeftModel, RandLoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, ViTConfig, ViTModel

from peft_read import LsttaConfig, ReadConfig, TrimodalForSequenceClassification


WEIGHTS = "inner_model.safetensors"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
EXACT = {"rtol": 0, "atol": 0}
# PEFT's, about any model that holds adapters already.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

INNER = {
    "lora": {"text_model": LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)},
    "read": {"text_model": ReadConfig(r=4, cell="gru", init_weights=False)},
    "randlora": {"text_model": RandLoraConfig(r=2, target_modules=["query", "value"], init_weights=False)},
    "both": {
        "text_model": LoraConfig(r=2, target_modules=["query", "output.dense"], init_lora_weights=False),
        "vision_model": ReadConfig(r=4, recur_over="frames", num_frames=2, init_weights=False),
    },
}


def base():
    torch.manual_seed(0)
    return TrimodalForSequenceClassification.from_pretrained_towers(
        vision=ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)),
        text=BertModel(BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)),
        num_labels=3,
        projection_dim=16,
    ).eval()


def config(**options):
    fields = {"r": 8, "num_heads": 2, "window": 2, "init_weights": False, "modules_to_save": ["classifier", "fusion"]}
    return LsttaConfig(**fields | options)


def adapted(inner):
    model = base()
    torch.manual_seed(1)
    for part, each in INNER[inner].items():
        inject_adapter_in_model(copy.deepcopy(each), model.get_submodule(part))
    return get_peft_model(model, config())


class Clips(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        return {
            "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
            "input_ids": torch.randint(5, 50, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.tensor(row % 3),
        }


def batch():
    rows = [Clips()[row] for row in range(4)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def assert_same(model, other):
    """The same weights, bit for bit, and the same outputs but for where the weights lie in memory."""
    weights, wanted = model.state_dict(), other.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-6)


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "sgd", "report_to": "none"}
        | {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0}
        | options,
    )
    return Trainer(model, arguments, train_dataset=Clips(), eval_dataset=Clips())


FRESH = """
import sys, torch, peft_read
from peft import PeftModel
from peft_read import TrimodalForSequenceClassification
base = TrimodalForSequenceClassification.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[3])).logits, sys.argv[4])
"""


@pytest.mark.parametrize("inner", INNER)
def test_both_are_trained_saved_and_loaded(inner, tmp_path):
    """By a Trainer, into one folder, which one call loads: exactly, and nothing else of the base trains."""
    model = adapted(inner)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = ("lora_", "randlora_", "read_", "lstta_", "modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in trained)
    run = trainer(model, tmp_path / "run")
    run.train()
    for part, each in INNER[inner].items():
        kind = f".{each.peft_type.value.lower()}_"
        changed = [n for n, p in model.named_parameters() if part in n and kind in n and not torch.equal(p, before[n])]
        assert changed, part
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "saved")
    assert_same(loaded, model)
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(base()), **EXACT)
    again = PeftModel.from_pretrained(base(), tmp_path / "saved", is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


def test_a_new_process_loads_both(tmp_path):
    """Nothing of the adapters is in the process that made them."""
    base().save_pretrained(tmp_path / "base")
    model = adapted("both")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(batch(), tmp_path / "batch")
    run_code(FRESH, *(tmp_path / name for name in ("base", "adapter", "batch", "out")))
    torch.testing.assert_close(torch.load(tmp_path / "out"), logits(model), rtol=0, atol=1e-6)


def test_a_trainer_loads_the_best_of_both(tmp_path):
    """`load_best_model_at_end` and a resumed run bring the inner adapters of the checkpoint back as well."""
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    model = adapted("both")
    run = trainer(model, tmp_path, load_best_model_at_end=True, learning_rate=3.0, **options)
    run.train()
    best = run.state.best_model_checkpoint
    assert_same(PeftModel.from_pretrained(base(), best), model)
    whole = trainer(adapted("both"), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(adapted("both"), tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(resumed.model, whole.model)


def test_what_would_be_in_no_file_is_refused_when_saving(tmp_path):
    """Before anything is written, with the way that it is saved."""
    model = adapted("lora")
    del model.get_base_model().text_model.peft_config
    with pytest.raises(ValueError, match=r"'default' in text_model.*would be in no file.*inject_adapter_in_model"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (LoraConfig(target_modules=["query"], modules_to_save=["pooler"]), "trains more than itself"),
        (LoraConfig(target_modules=["query"], bias="all"), "trains more than itself"),
    ],
)
def test_what_can_not_be_told_apart_is_refused_when_saving(inner, message, tmp_path):
    """What the outer adapter's file would hold as well."""
    model = base()
    inject_adapter_in_model(inner, model.text_model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config()).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_tower_that_is_a_peft_model_is_refused():
    """It hides which arguments the tower takes."""
    model = base()
    model.text_model = get_peft_model(model.text_model, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"text tower is a PeftModel.*inject_adapter_in_model"):
        get_peft_model(model, config())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_two_methods_under_one_name_are_refused():
    """PEFT would put one configuration in the place of the other."""
    model = inject_adapter_in_model(ReadConfig(target_modules=["text_model.encoder.layer.0.output.dense"]), base())
    with pytest.raises(ValueError, match=r"adapter 'default' of READ already"):
        get_peft_model(model, config())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.popitem(), "don't fit"),
        (lambda tensors: tensors.update({"embeddings.word_embeddings.weight": torch.zeros(50, 16)}), "don't fit"),
    ],
)
def test_inner_weights_that_do_not_fit_are_refused(spoil, message, tmp_path):
    """LoRA's as strictly as READ's, and the base stays as it was."""
    adapted("lora").save_pretrained(tmp_path)
    path = tmp_path / "inner.text_model.default" / WEIGHTS
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    model = base()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(model), before, **EXACT)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_base_without_that_part_is_refused(tmp_path):
    """The part is named."""
    adapted("lora").save_pretrained(tmp_path)
    model = base()
    model.text_encoder, model.text_model = model.text_model, None
    with pytest.raises(ValueError, match=r"saved with others in text_model"):
        PeftModel.from_pretrained(nn.Sequential(model), tmp_path)


def lora(**fields):
    return LoraConfig(**{"r": 2, "target_modules": ["value", "output.dense"], "init_lora_weights": False} | fields)


def with_inner(*names, outer=None, **fields):
    """A model with LoRAs of these names in its text tower, strong enough to be seen."""
    model = base()
    torch.manual_seed(1)
    for name in names:
        inject_adapter_in_model(lora(**fields), model.text_model, name)
    model = get_peft_model(model, outer or config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(10)
    return model


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def test_one_more_adapter_with_others_inside(tmp_path):
    """Those would act for all: the model has the very same, or the adapter is refused and the model as it was."""
    model = with_inner("default")
    model.add_adapter("second", config())
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    for alone in (
        PeftModel.from_pretrained(base(), tmp_path / "second"),
        PeftModel.from_pretrained(base(), tmp_path, subfolder="second"),
    ):
        torch.testing.assert_close(logits(alone), logits(model), **EXACT)
    both = PeftModel.from_pretrained(base(), tmp_path)
    both.load_adapter(tmp_path / "second", "second")
    both.set_adapter("second")
    torch.testing.assert_close(logits(both), logits(model), **EXACT)
    for other in (get_peft_model(base(), config()), with_inner("default", lora_alpha=3), with_inner("default")):
        if len(lora_layers(other)):
            with torch.no_grad():
                lora_layers(other)[0].lora_A["default"].weight.add_(1)
        before = logits(other)
        with pytest.raises(ValueError, match=r"in text_model|text_model has"):
            other.load_adapter(tmp_path, "third")
        assert list(other.peft_config) == ["default"]
        torch.testing.assert_close(logits(other), before, **EXACT)


def test_transformers_loads_those_inside_as_well(tmp_path):
    """Into a model without adapters; into another one, they would act for what is there."""
    model = with_inner("default")
    model.save_pretrained(tmp_path)
    other = base()
    other.load_adapter(tmp_path)
    torch.testing.assert_close(logits(other), logits(model), **EXACT)
    plain = base()
    inject_adapter_in_model(config(), plain)
    before = logits(plain)
    with pytest.raises(ValueError, match=r"'default' in text_model, which this model hasn't"):
        plain.load_adapter(tmp_path, adapter_name="second")
    torch.testing.assert_close(logits(plain), before, **EXACT)


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"], [], None], ids=str)
def test_which_of_them_act_is_saved(active, tmp_path):
    """One, several, none, or switched off."""
    model = with_inner("default", "second")
    for layer in lora_layers(model):
        if active is None:
            layer.enable_adapters(False)
        else:
            layer.set_adapter(active)
    with model.disable_adapter() if active else torch.no_grad():
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_one_that_acts_in_some_layers_is_refused_when_saving(tmp_path):
    """No file says so."""
    model = with_inner("default", "second")
    lora_layers(model)[0].set_adapter("default")
    with pytest.raises(ValueError, match="acts in some of its layers"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_inner_adapter_of_ones_own_is_not_overwritten(tmp_path):
    """Another configuration under the same name is refused; a file that is refused later changes no weight."""
    with_inner("default").save_pretrained(tmp_path)
    model = base()
    inject_adapter_in_model(lora(lora_alpha=2), model.text_model)
    before = logits(model)
    with pytest.raises(ValueError, match=r"text_model has an adapter 'default' of another configuration.*lora_alpha"):
        PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(model), before, **EXACT)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    model = base()
    inject_adapter_in_model(lora(), model.text_model)
    before = logits(model)
    with pytest.raises(ValueError, match="nothing was loaded"):
        PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(model), before, **EXACT)


@pytest.mark.parametrize("change", [lambda v: v * torch.nan, lambda v: v.to(torch.int8), lambda v: v > 0])
def test_inner_weights_that_are_no_numbers_are_refused(change, tmp_path):
    """As READ's are; an adapter that is loaded anew keeps what it had, the one around as well."""
    with_inner("default").save_pretrained(tmp_path)
    path = tmp_path / "inner.text_model.default" / WEIGHTS
    save_file({key: change(value) for key, value in load_file(path).items()}, path)
    model = with_inner("default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lstta_" in name:
                parameter.add_(0.1)
    before = logits(model)
    for load in (lambda: model.load_adapter(tmp_path, "default"), lambda: PeftModel.from_pretrained(base(), tmp_path)):
        with pytest.raises(ValueError, match=r"nothing was loaded: (not finite|wrong type)"):
            load()
    torch.testing.assert_close(logits(model), before, **EXACT)


def test_a_start_that_rewrites_the_base_is_undone(tmp_path):
    """PiSSA takes from the base what it trains; a refused file gives it back."""
    with_inner("default", init_lora_weights="pissa").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    model = base()
    before = logits(model)
    with pytest.raises(ValueError, match="nothing was loaded"):
        PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(model), before, **EXACT)


def test_a_missing_folder_is_named(tmp_path):
    """Of the adapter inside."""
    with_inner("default").save_pretrained(tmp_path)
    (tmp_path / "inner.text_model.default" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"saved with 'default' in text_model, but there is no .*inner\.text_model"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.filterwarnings("ignore:.*offload.*:UserWarning")
def test_those_in_offloaded_layers_are_refused(tmp_path):
    """PEFT makes them without values; READ's lie where they run."""
    with_inner("default").save_pretrained(tmp_path)
    offloaded = cpu_offload(base(), execution_device=torch.device("cpu"))
    before = logits(offloaded)
    with pytest.raises(ValueError, match="without values: the layer is offloaded"):
        PeftModel.from_pretrained(offloaded, tmp_path)
    torch.testing.assert_close(logits(offloaded), before, **EXACT)
    inject_adapter_in_model(lora(), offloaded.text_model)
    with pytest.raises(ValueError, match="without values: the layer is offloaded"):
        get_peft_model(offloaded, config())
    adapted("read").save_pretrained(tmp_path / "read")
    loaded = PeftModel.from_pretrained(cpu_offload(base(), execution_device=torch.device("cpu")), tmp_path / "read")
    torch.testing.assert_close(logits(loaded), logits(adapted("read")), rtol=0, atol=1e-6)
