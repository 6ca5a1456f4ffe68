"""Saving and loading: what is in the file, and that a file which doesn't fit is refused before anything is copied."""

import json
import pickle

import pytest
import torch
from fresh import run_code
from helpers import EXACT, adapted, batch_of, result, strengthen
from models import LAYERS, WIDTH, base_model, bert_config
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import BertModel

from peft_read import ReadConfig


BATCH = batch_of("bert")
WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.encoder.layer.0.output.dense"


@pytest.fixture
def saved(tmp_path):
    adapted("bert", cell="gru").save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Save the folder's weights again as `change` makes them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop(tensors):
    del tensors[f"{FIRST}.read_upward.bias"]


def add(tensors):
    tensors[f"{FIRST}.read_sideward.weight"] = torch.zeros(2)


def reshape(tensors):
    tensors[f"{FIRST}.read_upward.weight"] = torch.zeros(WIDTH, 5)


def rename(tensors):
    tensors[f"{FIRST}.read_upward.weights"] = tensors.pop(f"{FIRST}.read_upward.weight")


FAULTS = [
    pytest.param(drop, rf"missing: .*{FIRST}\.read_upward\.\w+\.bias", id="missing"),
    pytest.param(add, r"unexpected: .*read_sideward", id="unexpected"),
    pytest.param(reshape, rf"wrong shape: .*read_upward\.\w+\.weight.*\({WIDTH}, 5\).*\({WIDTH}, 4\)", id="shape"),
    pytest.param(rename, r"missing: .*read_upward[\s\S]*unexpected: .*read_upward", id="renamed"),
]


@pytest.mark.parametrize(
    ("cell", "bidirectional", "parts"),
    [
        ("none", False, {}),
        ("rnn", False, {"weight_ih_l0": (4, 4), "weight_hh_l0": (4, 4), "bias_ih_l0": (4,), "bias_hh_l0": (4,)}),
        ("gru", False, {"weight_ih_l0": (12, 4), "weight_hh_l0": (12, 4), "bias_ih_l0": (12,), "bias_hh_l0": (12,)}),
        ("lstm", False, {"weight_ih_l0": (16, 4), "weight_hh_l0": (16, 4), "bias_ih_l0": (16,), "bias_hh_l0": (16,)}),
        (
            "rnn",
            True,
            {
                f"{name}_l0{direction}": shape
                for name, shape in {"weight_ih": (4, 4), "weight_hh": (4, 4), "bias_ih": (4,), "bias_hh": (4,)}.items()
                for direction in ("", "_reverse")
            },
        ),
    ],
)
def test_saved_keys_and_shapes(cell, bidirectional, parts, tmp_path):
    """The literal content of a file: a change of format is a decision, not an accident."""
    adapted("bert", cell=cell, bidirectional=bidirectional).save_pretrained(tmp_path)
    states = 8 if bidirectional else 4
    expected = {}
    for layer in range(LAYERS):
        name = f"base_model.model.encoder.layer.{layer}.output.dense"
        expected |= {
            f"{name}.read_downward.weight": (4, 32),
            f"{name}.read_downward.bias": (4,),
            f"{name}.read_upward.weight": (32, states),
            f"{name}.read_upward.bias": (32,),
        }
        expected |= {f"{name}.read_recurrence.{part}": shape for part, shape in parts.items()}
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_a_small_adapter_is_a_small_file(saved):
    """A checkpoint holds the adapter only: its numbers and a header."""
    numbers = sum(tensor.numel() for tensor in load_file(saved / WEIGHTS).values())
    keys = len(load_file(saved / WEIGHTS))
    assert numbers == LAYERS * (4 * 32 + 4 + 2 * (12 * 4 + 12) + 32 * 4 + 32)
    assert (saved / WEIGHTS).stat().st_size < 4 * numbers + 200 * keys
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
@pytest.mark.parametrize("name", ["default", "other"])
def test_weights_that_do_not_fit_are_refused(saved, fault, message, name):
    """A missing, unexpected or misshapen key is an error that names it, under any adapter name."""
    edit(saved, fault)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base_model("bert"), saved, adapter_name=name)


@pytest.mark.parametrize(("fault", "message"), FAULTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_nothing_is_copied_before_the_refusal(saved, fault, message, low_cpu_mem_usage):
    """A model that refuses a second adapter's weights gives what it gave, and so does one that refuses its own."""
    edit(saved, fault)
    model = adapted("bert", cell="gru", seed=5)
    before, keys = result("bert", model, BATCH), {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("default", "second"):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(saved, name, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(result("bert", model, BATCH), before, **EXACT)
    for key, value in keys.items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_refused_name_can_be_loaded_again(saved, tmp_path):
    """The adapter that was refused doesn't stand in the way of the right file under its name."""
    good = tmp_path / "good"
    adapted("bert", cell="gru").save_pretrained(good)
    edit(saved, drop)
    model = adapted("bert", cell="gru", seed=5)
    with pytest.raises(ValueError, match="missing"):
        model.load_adapter(saved, "second")
    model.load_adapter(good, "second", is_trainable=True)
    model.set_adapter("second")
    expected = result("bert", adapted("bert", cell="gru"), BATCH)
    torch.testing.assert_close(result("bert", model.eval(), BATCH), expected, **EXACT)


def test_an_adapter_of_another_base_model_is_refused(saved):
    """The message says which base model the adapter names and what differs."""
    wider = BertModel(bert_config(hidden_size=2 * WIDTH))
    with pytest.raises(ValueError, match=r"another base model[\s\S]*wrong shape"):
        PeftModel.from_pretrained(wider, saved)
    with pytest.raises(ValueError, match=r"Target modules|target_modules|not found"):
        PeftModel.from_pretrained(base_model("llama"), saved)


def test_more_layers_than_the_base_model_has(saved):
    """Weights for blocks that aren't there are named, not skipped."""
    shallow = BertModel(bert_config(), add_pooling_layer=False)
    shallow.encoder.layer = shallow.encoder.layer[:1]
    with pytest.raises(ValueError, match=r"unexpected: .*layer\.1"):
        PeftModel.from_pretrained(shallow, saved)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda good: b"", id="empty"),
        pytest.param(lambda good: good[: len(good) // 2], id="truncated"),
        pytest.param(lambda good: b"\xff" * 16 + good[16:], id="corrupted"),
        pytest.param(lambda good: b"not weights at all, just text", id="text"),
    ],
)
def test_a_broken_file_is_refused(saved, content):
    """safetensors' own error, and the model gives what it gave."""
    path = saved / WEIGHTS
    path.write_bytes(content(path.read_bytes()))
    model = adapted("bert", seed=5)
    before = result("bert", model, BATCH)
    with pytest.raises(Exception, match=r"(?i)header|deserializing|safetensor"):
        model.load_adapter(saved, "second")
    torch.testing.assert_close(result("bert", model, BATCH), before, **EXACT)


def test_a_foreign_safetensors_file_is_refused(saved):
    """The weights of something else, here the base model's own, fit nowhere."""
    tensors = {key: value.clone() for key, value in base_model("bert").state_dict().items()}
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: .*read_downward"):
        PeftModel.from_pretrained(base_model("bert"), saved)


def test_code_in_a_pickled_file_is_not_run(saved, tmp_path):
    """A `.bin` of someone else's is data: what it would run on unpickling doesn't run."""
    (saved / WEIGHTS).unlink()
    trace = tmp_path / "it_ran"

    class Malice:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save({f"{FIRST}.read_upward.bias": Malice()}, saved / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        PeftModel.from_pretrained(base_model("bert"), saved)
    assert not trace.exists()


def test_a_harmless_pickled_file_loads(saved):
    """PEFT's old file format goes on working, just as strictly."""
    tensors = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    loaded = PeftModel.from_pretrained(base_model("bert"), saved, is_trainable=True).eval()
    expected = result("bert", adapted("bert", cell="gru"), BATCH)
    torch.testing.assert_close(result("bert", loaded, BATCH), expected, **EXACT)
    torch.save({key: value for key, value in tensors.items() if "upward" not in key}, saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"missing: .*read_upward"):
        PeftModel.from_pretrained(base_model("bert"), saved)


def test_unknown_value_in_a_saved_config_is_refused(saved):
    """A configuration from the future, or a damaged one, says what is allowed."""
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cell": "mamba"}))
    with pytest.raises(ValueError, match=r"`cell` must be one of 'rnn', 'gru', 'lstm', 'none', got 'mamba'"):
        PeftModel.from_pretrained(base_model("bert"), saved)


FRESH = """
import sys
import torch
import peft_read
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModel
model = PeftModel.from_pretrained(AutoModel.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
batch = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model(**batch).last_hidden_state, sys.argv[4])
"""


def test_a_fresh_process_loads_what_another_saved(tmp_path):
    """Nothing of an adapter is in the process that made it."""
    base, model = base_model("bert"), adapted("bert", cell="lstm")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(BATCH, tmp_path / "batch")
    run_code(FRESH, *(tmp_path / name for name in ("base", "adapter", "batch", "out")))
    with torch.no_grad():
        expected = model(**BATCH).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_weights_of_other_methods_are_not_in_the_file(tmp_path):
    """LoRA in the same model keeps its weights to itself, and the file loads without it."""
    base = base_model("bert")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"], init_lora_weights=True), base.encoder)
    strengthen(get_peft_model(base, ReadConfig(r=4))).save_pretrained(tmp_path)
    assert all(".read_" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    torch.testing.assert_close(result("bert", loaded, BATCH), result("bert", adapted("bert"), BATCH), **EXACT)
