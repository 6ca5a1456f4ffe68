"""Base models in half precision, or kept elsewhere than where they compute."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from generators import CACHE, DECODER, assert_same, generate, generator, prompt, text_prompt
from helpers import ADD_ADAPTER, adapter_parameters, strengthen
from peft import get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from peft_read import ReadConfig


BATCH = text_prompt((9, 5, 1))
TARGETS = r".*mlp\.down_proj"


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits


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
