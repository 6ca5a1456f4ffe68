"""PEFT's semantics: several adapters, switching, deleting, saved heads, status, and merging, which is refused."""

import pytest
import torch
from helpers import EXACT, adapted, adapter_parameters, batch_of, loss_of, result, strengthen
from models import FAMILIES, base_model, classifier
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from peft_read import ReadConfig, describe_tokens
from peft_read.read.layer import ReadLayer


BATCH = batch_of("bert")
LABELS = torch.tensor([0, 1, 2])
# The sum of several adapters rounds in another order.
SUM = {"rtol": 0, "atol": 1e-5}


def two_adapters(**second):
    """BERT with a GRU adapter `default` and another of another width, both strong; the first is active."""
    model = adapted("bert", cell="gru")
    model.add_adapter("second", ReadConfig(**{"r": 6, "cell": "lstm"} | second))
    return strengthen(model, seed=1, adapter_name="second").eval()


def read_layers(model):
    return [module for module in model.modules() if isinstance(module, ReadLayer)]


def with_head(seed=0):
    """A classifier with an adapter and a head that is trained beside it."""
    model = get_peft_model(classifier(), ReadConfig(r=4, cell="gru", task_type="SEQ_CLS"))
    return strengthen(model, seed)


def test_adapters_of_different_rank_are_independent():
    """Each adapter computes what it computes alone, and the first stays active when a second is added."""
    model = two_adapters()
    torch.testing.assert_close(
        result("bert", model, BATCH), result("bert", adapted("bert", cell="gru"), BATCH), **EXACT
    )
    model.set_adapter("second")
    alone = adapted("bert", seed=1, r=6, cell="lstm")
    torch.testing.assert_close(result("bert", model, BATCH), result("bert", alone, BATCH), **EXACT)


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_active_adapters_add_up(order):
    """Each of several active adapters adds to the base's output what it adds alone, in whatever order."""
    model = two_adapters(target_modules=["encoder.layer.1.output.dense"])
    layer = model.base_model.model.encoder.layer[1].output.dense
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
    deltas = []
    with describe_tokens():
        for name in order:
            model.set_adapter(name)
            deltas.append(layer(x) - layer.base_layer(x))
        model.base_model.set_adapter(order)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + deltas[0] + deltas[1], **SUM)
    assert min(delta.abs().max() for delta in deltas) > 0.1


def test_set_adapter_trains_the_active_one_only():
    """`set_adapter` moves the gradient too."""
    model = two_adapters()
    for active in ("second", "default"):
        model.set_adapter(active)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == set(adapter_parameters(model, active))


def test_an_inactive_adapter_is_added_frozen():
    """Adding an adapter doesn't start to train it, in layers that the first adapter doesn't have either."""
    model = adapted("bert", layers_to_transform=[0])
    model.add_adapter("second", ReadConfig(r=4))
    assert not any(p.requires_grad for p in adapter_parameters(model, "second").values())
    assert all(p.requires_grad for p in adapter_parameters(model).values())


def test_delete_adapter_leaves_nothing_behind():
    """Deleting cleans every dictionary of every layer; the other adapter goes on as before."""
    model = two_adapters()
    before = result("bert", model, BATCH)
    model.delete_adapter("second")
    torch.testing.assert_close(result("bert", model, BATCH), before, **EXACT)
    for layer in read_layers(model):
        held = [value for value in (vars(layer) | layer._modules).values() if isinstance(value, dict | nn.ModuleDict)]
        assert not any("second" in value for value in held)
        assert layer.active_adapters == ["default"]
    assert not any("second" in key for key in model.state_dict())
    model.add_adapter("second", ReadConfig(r=3))
    assert {layer.r["second"] for layer in read_layers(model)} == {3}


def test_deleting_the_active_adapter_activates_the_other():
    """As with PEFT's own methods, a remaining adapter takes over."""
    model = two_adapters()
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    alone = adapted("bert", seed=1, r=6, cell="lstm")
    torch.testing.assert_close(result("bert", model, BATCH), result("bert", alone, BATCH), **EXACT)


def test_head_is_trained_saved_and_loaded(tmp_path):
    """`modules_to_save` trains a head beside the adapter and saves both; PEFT adds the classifier's by itself."""
    model = with_head().train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trainable if "classifier.modules_to_save.default" in name}
    assert heads
    assert trainable == heads | set(adapter_parameters(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**BATCH, labels=LABELS).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # The head looks at the first token alone, in whose last block the recurrence has no state yet to learn from.
    assert trainable - changed == {name for name in trainable if "layer.1" in name and "weight_hh" in name}
    assert changed <= trainable
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**BATCH).logits
        for name in ("default", "other"):
            loaded = PeftModel.from_pretrained(classifier(), tmp_path, adapter_name=name, is_trainable=True).eval()
            torch.testing.assert_close(loaded(**BATCH).logits, expected, **EXACT)


def test_auto_model_loads_base_adapter_and_head(tmp_path):
    """`AutoPeftModelForSequenceClassification` needs nothing but the adapter's folder."""
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    model = strengthen(get_peft_model(base, ReadConfig(r=4, task_type="SEQ_CLS", modules_to_save=["classifier"])))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, model.eval()(**BATCH).logits, rtol=0, atol=1e-6)


def test_auto_model_without_task(tmp_path):
    """`AutoPeftModel` finds the base model's class in the saved configuration."""
    base = base_model("bert")
    base.save_pretrained(tmp_path / "base")
    model = adapted("bert")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", is_trainable=True).eval()
    torch.testing.assert_close(result("bert", loaded, BATCH), result("bert", model, BATCH), **EXACT)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_trains_on_when_asked(is_trainable, tmp_path):
    """PEFT loads adapters for inference; `is_trainable=True` goes on training them."""
    adapted("bert").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model("bert"), tmp_path, is_trainable=is_trainable)
    assert {p.requires_grad for p in adapter_parameters(model).values()} == {is_trainable}
    if is_trainable:
        loss_of("bert", model.train(), BATCH).backward()
        assert all(p.grad is not None for p in adapter_parameters(model).values())


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
def test_low_cpu_mem_usage(cell, tmp_path):
    """Loading by way of empty weights gives the same model, with nothing left on the meta device."""
    model = adapted("bert", cell=cell)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path, low_cpu_mem_usage=True, is_trainable=True).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(result("bert", loaded, BATCH), result("bert", model, BATCH), **EXACT)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    torch.testing.assert_close(result("bert", model, BATCH), result("bert", loaded, BATCH), rtol=0, atol=1e-6)


def test_status_names_what_is_adapted():
    """`get_layer_status` lists the adapted modules, `get_model_status` sums them up."""
    model = two_adapters(layers_to_transform=[1])
    layers = get_layer_status(model)
    assert [status.name for status in layers] == [f"model.{name}" for name in FAMILIES["bert"].targets]
    assert {status.module_type for status in layers} == {"read.ReadLinear"}
    assert [sorted(status.available_adapters) for status in layers] == [["default"], ["default", "second"]]
    assert layers[1].requires_grad == {"default": True, "second": False}
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == len(layers)
    assert status.trainable_params == sum(p.numel() for p in adapter_parameters(model).values())
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def test_print_trainable_parameters(capsys):
    """The count that users look at first is that of the adapter."""
    model = adapted("bert", cell="gru", r=4)
    model.print_trainable_parameters()
    width, r, layers = 32, 4, 2
    expected = layers * (width * r + r + 2 * (3 * r * r + 3 * r) + r * width + width)
    assert f"trainable params: {expected:,} " in capsys.readouterr().out


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
@pytest.mark.parametrize("head", [False, True])
def test_merging_is_refused_and_touches_nothing(how, head):
    """A recurrence can't be folded into a matrix: the error says so before anything is unloaded, a head included."""
    model = with_head().eval() if head else adapted("bert")
    modules = {name: id(module) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(**BATCH)[0]
        with pytest.raises(NotImplementedError, match=r"READ can't be merged.*`unload\(\)`"):
            getattr(model, how)()
        torch.testing.assert_close(model(**BATCH)[0], before, **EXACT)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(layer.merged_adapters == [] for layer in read_layers(model))


@pytest.mark.parametrize("how", ["merge", "unmerge"])
def test_a_layer_refuses_to_merge(how):
    """Also where the layer itself is asked."""
    layer = read_layers(adapted("bert"))[0]
    with pytest.raises(NotImplementedError, match="READ can't be merged"):
        getattr(layer, how)()
    assert layer.merged_adapters == []
    assert not layer.merged


def test_mixed_model_refuses():
    """PEFT's model for mixed types knows a fixed list of methods."""
    with pytest.raises(ValueError, match="READ"):
        PeftMixedModel(base_model("bert"), ReadConfig(), "default")
    with pytest.raises(ValueError, match="READ"):
        get_peft_model(base_model("bert"), ReadConfig(), mixed=True)


def test_a_module_adapted_by_another_method_is_refused():
    """READ around a LoRA layer would be half seen by both methods."""
    lora = inject_adapter_in_model(LoraConfig(target_modules=["output.dense"]), base_model("bert"))
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ValueError, match=r"encoder\.layer\.0\.output\.dense.*adapted by peft\.tuners\.lora"),
    ):
        inject_adapter_in_model(ReadConfig(), lora)


def test_injection_without_a_peft_model():
    """`inject_adapter_in_model` leaves the model's class alone and adapts as `get_peft_model` does."""
    base = base_model("bert")
    model = strengthen(inject_adapter_in_model(ReadConfig(r=4, cell="gru"), base))
    assert model is base
    torch.testing.assert_close(
        result("bert", model, BATCH), result("bert", adapted("bert", cell="gru"), BATCH), **EXACT
    )
