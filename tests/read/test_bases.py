"""Base models that are quantised, in half precision, or kept elsewhere than where they compute."""

import importlib.util

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from generators import CACHE, DECODER, assert_same, difference, generate, generator, prompt, text_prompt
from helpers import ADD_ADAPTER, adapter_parameters, strengthen
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_read import ReadConfig


BATCH = text_prompt((9, 5, 1))
TARGETS = r".*mlp\.down_proj"


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} isn't installed")


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTISED = [
    pytest.param(lambda: BitsAndBytesConfig(load_in_8bit=True), id="8 bit", marks=needs("bitsandbytes")),
    pytest.param(
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        id="4 bit",
        marks=needs("bitsandbytes"),
    ),
    pytest.param(torchao_config, id="torchao int8", marks=needs("torchao")),
]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**DECODER | size)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits


@pytest.mark.filterwarnings("ignore")  # of the quantisation libraries about this machine
@pytest.mark.parametrize("quantisation", QUANTISED)
def test_quantised(quantisation, llama_folder, tmp_path):
    """Starts as the base, trains the adapter only, decodes with a cache as without, saves and loads."""

    def load():
        model = LlamaForCausalLM.from_pretrained(llama_folder, device_map="cpu", quantization_config=quantisation())
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model.eval()

    base = load()
    expected = logits(base)
    model = get_peft_model(base, ReadConfig(r=4, cell="gru", target_modules=TARGETS))
    assert torch.equal(logits(model), expected)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model).values())
    strengthen(model)
    adapted = logits(model)
    assert (adapted - expected).abs().max() > 0.1
    with torch.no_grad():
        cached, uncached = (generate(model, BATCH, use_cache=use) for use in (True, False))
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
            of_base = difference(*(generate(model, BATCH, use_cache=use) for use in (True, False)))
    assert difference(cached, uncached) <= max(1e-5, 2 * of_base)
    model(**BATCH).logits.float().log_softmax(-1)[..., 5].mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == set(adapter_parameters(model))
    assert all(bool(p.grad.isfinite().all()) for p in adapter_parameters(model).values())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    # Last: bitsandbytes' 4 bit layers give something else on a CPU once their `state_dict` was taken.
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path).eval()), adapted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "through_peft", [True, pytest.param(False, marks=ADD_ADAPTER)], ids=["get_peft_model", "add_adapter"]
)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_half_precision(dtype, through_peft, cell):
    """A cache brings no more error than it brings the base model, whose keys it holds in half precision."""
    model = LlamaForCausalLM(LlamaConfig(**DECODER)).to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    config = ReadConfig(r=4, cell=cell, target_modules=TARGETS)
    ids = BATCH["input_ids"]
    past = {"input_ids": ids[:, :5], "attention_mask": BATCH["attention_mask"][:, :5]}

    @torch.no_grad()
    def error_of_a_cache(model):
        cache = getattr(model(**past, use_cache=True), CACHE)
        second = model(input_ids=ids[:, 5:], attention_mask=BATCH["attention_mask"], **{CACHE: cache}).logits
        whole = logits(model)[:, 5:]
        valid = BATCH["attention_mask"][:, 5:].bool()
        return float((second - whole)[valid].abs().max()), float(whole.abs().max())

    of_base, _ = error_of_a_cache(model)
    if through_peft:
        model = get_peft_model(model, config).eval()
    else:
        model.add_adapter(config)
    strengthen(model)
    error, scale = error_of_a_cache(model)
    assert error <= 4 * max(of_base, torch.finfo(dtype).eps * scale)


OFFLOADED = {
    "memory": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "device map": lambda model, folder: dispatch_model(
        model,
        {"base_model.model.model.layers.0": "disk", "base_model.model.model.layers.1": "cpu"}
        | {f"base_model.model.{part}": "cpu" for part in ("lm_head", "model.embed_tokens", "model.norm")}
        | {"base_model.model.model.rotary_emb": "cpu"},
        main_device="cpu",
        offload_dir=folder,
    ),
}


# transformers before 5.23 takes the place where weights lie for the one where they compute.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("where", OFFLOADED)
def test_offloaded(where, cell, tmp_path):
    """accelerate fetches weights when a module is called; the recurrence reads its cell's without calling it."""
    model, batch = generator("llama", cell), prompt("llama")
    expected, generated = logits(model), generate(model, batch)
    OFFLOADED[where](model, tmp_path)
    assert any(p.device.type == "meta" for p in adapter_parameters(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert_same(generate(model, batch), generated)
    assert any(p.device.type == "meta" for p in adapter_parameters(model).values())
