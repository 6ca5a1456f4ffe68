"""Quantised base models, where the libraries for them are installed: `.ci/quantised` installs them."""

import importlib.util

import pytest
import torch
from generators import DECODER, difference, generate, text_prompt
from helpers import adapter_parameters, strengthen
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_read import ReadConfig


BATCH = text_prompt((9, 5, 1))
TARGETS = r".*mlp\.down_proj"


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} isn't installed; .ci/quantised runs this")


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


QUANTISED = [
    pytest.param(lambda: BitsAndBytesConfig(load_in_8bit=True), id="8 bit", marks=needs("bitsandbytes")),
    pytest.param(nf4, id="nf4", marks=needs("bitsandbytes")),
    pytest.param(int8, id="int8", marks=needs("torchao")),
]
# What the quantisation libraries say about this machine.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parametrize("quantisation", QUANTISED)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**DECODER | size)).save_pretrained(folder)
    return folder


def load(folder, quantisation):
    model = LlamaForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=quantisation())
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits


@pytest.mark.parametrize("cell", ["none", "rnn", "gru", "lstm"])
def test_training_and_generation(quantisation, cell, folder):
    """Starts as the base, decodes with a cache as without, trains the adapter only, in float32."""
    base = load(folder, quantisation)
    expected = logits(base)
    model = get_peft_model(base, ReadConfig(r=4, cell=cell, target_modules=TARGETS)).eval()
    assert torch.equal(logits(model), expected)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model).values())
    strengthen(model)
    assert (logits(model) - expected).abs().max() > 0.1
    with torch.no_grad():
        cached, uncached = (generate(model, BATCH, use_cache=use) for use in (True, False))
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
            of_base = difference(*(generate(model, BATCH, use_cache=use) for use in (True, False)))
            without = generate(model, BATCH, use_cache=False)
    # bitsandbytes' 4 bit kernel for CPUs rounds to bfloat16 inside, so that noise of 1e-7 can become a step of it.
    noise = torch.finfo(torch.bfloat16).eps * 3 if quantisation is nf4 else 5e-5
    assert difference(cached, uncached) <= max(noise, 2 * of_base)
    assert difference(cached, without) > 10 * noise
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = -model(**BATCH).logits.float().log_softmax(-1)[..., 5].mean()
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapter_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("cell", ["none", "rnn", "gru", "lstm"])
def test_saving_and_loading(quantisation, cell, low_cpu_mem_usage, folder, tmp_path):
    """Exactly, with the adapter's weights made on the meta device first or not."""
    model = strengthen(get_peft_model(load(folder, quantisation), ReadConfig(r=4, cell=cell, target_modules=TARGETS)))
    # First: bitsandbytes' 4 bit layers give something else on a CPU once their `state_dict` was taken.
    adapted = logits(model.eval())
    model.save_pretrained(tmp_path)
    base = load(folder, quantisation)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(logits(loaded), adapted, rtol=0, atol=0)
    assert not any(p.is_meta for p in loaded.parameters())
