"""Files whose weights are no numbers, named twice or of another configuration, and batches that can't be mixed."""

from pickle import UnpicklingError

import pytest
import torch
from models import base_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_read import ReadConfig


WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EXACT = {"rtol": 0, "atol": 0}
IDS = torch.arange(16).view(2, 8)


def config(**fields):
    return ReadConfig(**{"r": 4, "cell": "gru", "init_weights": False} | fields)


def llama(**fields):
    return get_peft_model(base_model("llama"), config(**fields)).eval()


def logits(model, **options):
    with torch.no_grad():
        return model.eval()(IDS, **options).logits


class Normed(nn.Module):
    """A model with buffers, one of them infinite."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.norm.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("field", "value"),
    [("scaling", 3.0), ("act_fn", "relu"), ("cell", "rnn"), ("trainable_token_indices", [5])],
)
def test_weights_of_another_configuration_under_the_same_name(field, value, tmp_path):
    """They would be right in size and computed with otherwise; under a name of their own they load."""
    options = {"trainable_token_indices": [3]} if field == "trainable_token_indices" else {}
    saved, model = llama(**{field: value}), llama(**options)
    saved.save_pretrained(tmp_path)
    before = logits(model)
    with pytest.raises(ValueError, match=rf"already, of another configuration than the saved one \({field}="):
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model), before, **EXACT)
    if not options:
        model.load_adapter(tmp_path, "second")
        model.set_adapter("second")
        torch.testing.assert_close(logits(model), logits(saved), **EXACT)
    same = llama(**{field: value})
    same.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(same), logits(saved), **EXACT)


def test_a_configuration_of_ones_own_for_a_file(tmp_path):
    """`from_pretrained(..., config=...)` is what the user says."""
    llama().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, config=config(scaling=2.0))
    assert loaded.peft_config["default"].scaling == 2.0


@pytest.mark.parametrize("change", [lambda key: key.replace(".weight", ".default.weight"), lambda key: key[17:]])
def test_a_weight_that_is_named_twice_is_refused(change, tmp_path):
    """Nobody can say which one counts."""
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.startswith(PREFIX) and key.endswith("read_downward.weight"))
    tensors[change(key)] = torch.zeros_like(tensors[key])
    save_file(tensors, tmp_path / WEIGHTS)
    base, model = base_model("llama"), llama()
    before = logits(base), logits(model)
    with pytest.raises(ValueError, match=r"nothing was loaded[\s\S]*read_downward"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=r"nothing was loaded[\s\S]*read_downward"):
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close((logits(base), logits(model)), before, **EXACT)


def test_buffers_are_numbers_as_well(tmp_path):
    """Infinite only where the model's own are."""
    model = get_peft_model(Normed(), config(target_modules=["linear"], modules_to_save=["norm"])).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Normed(), tmp_path).eval()
    assert torch.equal(loaded.base_model.model.norm.modules_to_save["default"].mask, Normed().norm.mask)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, value in [("running_var", torch.nan), ("running_mean", torch.inf), ("mask", torch.nan)]:
        spoiled = {key: tensor.clone() for key, tensor in tensors.items()}
        spoiled[next(key for key in tensors if key.endswith(name))].fill_(value)
        save_file(spoiled, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=rf"not finite: .*{name}"):
            PeftModel.from_pretrained(Normed(), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.tolist(), "no tensor"),
        (lambda value: None, "no tensor"),
        (lambda value: value.to_sparse(), "no plain tensor"),
        (lambda value: torch.nested.nested_tensor([value]), "no plain tensor"),
        (lambda value: value.to("meta"), "meta device"),
    ],
    ids=["list", "None", "sparse", "nested", "meta"],
)
def test_odd_values_of_pickled_weights(change, message, low_cpu_mem_usage, tmp_path):
    """Named, whichever way they are copied; torch 2.15 itself reads no nested tensors."""
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    key = next(iter(tensors))
    torch.save(tensors | {key: change(tensors[key])}, tmp_path / "adapter_model.bin")
    base = base_model("llama")
    before = logits(base)
    refused = rf"nothing was loaded[\s\S]*{message}|_rebuild_nested_tensor was not an allowed global"
    with pytest.raises((ValueError, UnpicklingError), match=refused):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(base), before, **EXACT)


def test_a_batch_of_adapters_of_which_one_trains_tokens():
    """PEFT mixes those that do; the others are named."""
    model = llama(trainable_token_indices=[3])
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match=r"can't mix adapters that train tokens of .*embed_tokens with 'second'"):
        logits(model, adapter_names=["default", "second"])
    mixed = logits(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], logits(model)[0], rtol=0, atol=1e-5)


def test_a_batch_of_adapters_that_train_what_has_no_samples():
    """The rows of T5's biases of distances are positions."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))
    fields = {"target_modules": ["wo"], "modules_to_save": ["relative_attention_bias"]}
    model = get_peft_model(base, config(**fields)).eval()
    model.add_adapter("second", config(**fields))
    for length in (8, 2):  # as many positions as samples, too
        ids = IDS[:, :length]
        with pytest.raises(ValueError, match="its rows aren't those of samples"), torch.no_grad():
            model(input_ids=ids, decoder_input_ids=ids, adapter_names=["default", "second"])
