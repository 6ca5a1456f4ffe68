"""transformers' own adapter methods, which know no `PeftModel`: nothing that the layers need may live on one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ADD_ADAPTER, EXACT, adapted, adapter_parameters, batch_of, loss_of, result, strengthen
from models import base_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertModel, LlamaForCausalLM

from peft_read import ReadConfig, describe_tokens
from peft_read.read.layer import ReadLayer


CLASSES = {"bert": BertModel, "llama": LlamaForCausalLM}
EVERY = pytest.mark.parametrize("family", CLASSES)
WEIGHTS = "adapter_model.safetensors"


def with_adapter(family, name="default", **options):
    model = base_model(family)
    model.add_adapter(ReadConfig(**{"r": 4, "cell": "gru"} | options), adapter_name=name)
    return strengthen(model, adapter_name=name).eval()


def left_padded(family):
    return batch_of(family, padding="left")


@ADD_ADAPTER
@EVERY
def test_add_adapter_equals_get_peft_model(family):
    """The same output, padding included, as through PEFT."""
    batch = left_padded(family)
    expected = result(family, adapted(family, cell="gru"), batch)
    torch.testing.assert_close(result(family, with_adapter(family), batch), expected, **EXACT)


@ADD_ADAPTER
@EVERY
def test_add_adapter_starts_as_the_base_model_and_trains_the_adapter_only(family):
    """Bit for bit the base model's output at the start; gradients for the adapter alone."""
    model, batch = base_model(family), left_padded(family)
    expected = result(family, model, batch)
    model.add_adapter(ReadConfig(r=4, cell="gru"))
    torch.testing.assert_close(result(family, model, batch), expected, **EXACT)
    loss_of(family, model.train(), batch).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapter_parameters(model))


@ADD_ADAPTER
@EVERY
@pytest.mark.parametrize("name", ["default", "other"])
def test_save_and_load_adapter(family, name, tmp_path):
    """`save_pretrained` writes the adapter, `load_adapter` reads it under any name."""
    model, batch = with_adapter(family), left_padded(family)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"generation_config.json"} == {"adapter_config.json", WEIGHTS}
    loaded = base_model(family)
    loaded.load_adapter(tmp_path, adapter_name=name)
    torch.testing.assert_close(result(family, loaded, batch), result(family, model, batch), rtol=0, atol=1e-6)


@EVERY
@pytest.mark.parametrize("name", ["default", "other"])
def test_load_adapter(family, name, tmp_path):
    """What PEFT saved, under any name."""
    model, batch = adapted(family, cell="gru"), left_padded(family)
    model.save_pretrained(tmp_path)
    loaded = base_model(family)
    loaded.load_adapter(tmp_path, adapter_name=name)
    torch.testing.assert_close(result(family, loaded, batch), result(family, model, batch), rtol=0, atol=1e-6)


@ADD_ADAPTER
@EVERY
def test_from_pretrained_of_an_adapter_folder(family, tmp_path):
    """A folder that names its base model is loaded in one call."""
    base_model(family).save_pretrained(tmp_path / "base")
    model = CLASSES[family].from_pretrained(tmp_path / "base").requires_grad_(False)
    model.add_adapter(ReadConfig(r=4, cell="gru"))
    strengthen(model).save_pretrained(tmp_path / "adapter")
    loaded, batch = CLASSES[family].from_pretrained(tmp_path / "adapter"), left_padded(family)
    torch.testing.assert_close(result(family, loaded, batch), result(family, model, batch), rtol=0, atol=1e-6)


@ADD_ADAPTER
@EVERY
def test_files_are_peft_files(family, tmp_path):
    """What transformers saves PEFT loads, and the other way round."""
    batch = left_padded(family)
    with_adapter(family).save_pretrained(tmp_path / "theirs")
    adapted(family, cell="gru").save_pretrained(tmp_path / "pefts")
    expected = result(family, adapted(family, cell="gru"), batch)
    by_peft = PeftModel.from_pretrained(base_model(family), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(result(family, by_peft, batch), expected, **EXACT)
    by_transformers = base_model(family)
    by_transformers.load_adapter(tmp_path / "pefts")
    torch.testing.assert_close(result(family, by_transformers, batch), expected, rtol=0, atol=1e-6)


@ADD_ADAPTER
@EVERY
def test_switching_and_deleting(family):
    """`set_adapter`, `disable_adapters`, `enable_adapters` and `delete_adapter` do what they say."""
    model, batch = with_adapter(family, "one"), left_padded(family)
    one = result(family, model, batch)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):  # said of every second adapter
        model.add_adapter(ReadConfig(r=6, cell="lstm"), adapter_name="two")
    strengthen(model, seed=1, adapter_name="two")
    assert model.active_adapters() == ["two"]
    two = result(family, model, batch)
    model.set_adapter("one")
    torch.testing.assert_close(result(family, model, batch), one, **EXACT)
    model.disable_adapters()
    torch.testing.assert_close(result(family, model, batch), result(family, base_model(family), batch), **EXACT)
    model.enable_adapters()
    model.set_adapter("two")
    model.delete_adapter("one")
    assert not adapter_parameters(model, "one")
    assert not any("one" in m.r or "one" in m.activation for m in model.modules() if isinstance(m, ReadLayer))
    torch.testing.assert_close(result(family, model, batch), two, **EXACT)


@ADD_ADAPTER
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
def test_bfloat16_model(cell):
    """There the adapter keeps the base's bfloat16 weights; it computes in float32 inside all the same."""
    model = base_model("bert").bfloat16()
    model.add_adapter(ReadConfig(r=4, cell=cell))
    strengthen(model).eval()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}
    layer = model.encoder.layer[0].output.dense
    x = torch.randn(2, 40, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        hidden = layer.base_layer(x)
        states = layer.read_downward["default"].float()(hidden.float())
        if cell != "none":
            states = layer.read_recurrence["default"].float()(states)
        delta = layer.read_upward["default"].float()(F.gelu(states))
        expected = hidden + delta.bfloat16()
        layer.bfloat16()
        with describe_tokens():
            actual = layer(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


@ADD_ADAPTER
def test_bfloat16_round_trip(tmp_path):
    """Weights are saved as they are and loaded into a bfloat16 model."""
    model, batch = base_model("bert").bfloat16(), left_padded("bert")
    model.add_adapter(ReadConfig(r=4, cell="gru"))
    strengthen(model).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    loaded = base_model("bert").bfloat16()
    loaded.load_adapter(tmp_path)
    torch.testing.assert_close(result("bert", loaded, batch), result("bert", model, batch), **EXACT)


def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


UPWARD = "encoder.layer.0.output.dense.read_upward"


def key_of(tensors):
    return next(key for key in tensors if UPWARD in key and key.endswith("weight"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda tensors: tensors.pop(key_of(tensors)), r"missing: .*read_upward"),
        (
            lambda t: t.update({key_of(t).replace("upward", "sideward"): torch.zeros(1)}),
            r"unexpected: .*read_sideward",
        ),
        (lambda tensors: tensors.update({key_of(tensors): torch.zeros(2, 2)}), r"wrong shape: .*read_upward"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_load_adapter_refuses_what_does_not_fit(fault, message, tmp_path):
    """As PEFT's loaders do, where transformers itself would log a table."""
    adapted("bert", cell="gru").save_pretrained(tmp_path)
    spoil(tmp_path, fault)
    with pytest.raises(ValueError, match=message):
        base_model("bert").load_adapter(tmp_path)
