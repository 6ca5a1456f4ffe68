"""Bases whose weights accelerate has offloaded: as the same base in memory, and left where they lie."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import EXACT, strengthen, token_rows
from lstta_models import adapted as lstta_adapted
from lstta_models import assert_same, composite
from lstta_models import batch_of as composite_batch
from lstta_models import result as composite_result
from models import base_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_read import LsttaConfig, ReadConfig


IDS = torch.stack(token_rows((8, 8)))
CPU = torch.device("cpu")
PARTS = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
PARTS |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model on disk, as people load it."""
    folder = tmp_path_factory.mktemp("base")
    base_model("llama").save_pretrained(folder)
    return folder


def partly_on_disk(folder, work):
    return LlamaForCausalLM.from_pretrained(folder, device_map=PARTS, offload_folder=work)


def on_cpu(folder, work):
    return cpu_offload(LlamaForCausalLM.from_pretrained(folder), execution_device=CPU)


def on_disk(folder, work):
    return disk_offload(LlamaForCausalLM.from_pretrained(folder), work, execution_device=CPU)


BASES = [partly_on_disk, on_cpu, on_disk]
pytestmark = pytest.mark.filterwarnings("ignore:.*offload.*:UserWarning")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def train(model):
    """Losses of three steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def adapt(base, **options):
    torch.manual_seed(0)
    return get_peft_model(base, ReadConfig(**{"r": 4, "cell": "gru", "modules_to_save": ["lm_head"]} | options))


@pytest.mark.parametrize("offloaded", BASES)
def test_training_saving_and_loading(offloaded, folder, tmp_path):
    """Losses, file and what comes after are those of the base in memory, a trained head of the base included."""
    plain, model = adapt(LlamaForCausalLM.from_pretrained(folder)), adapt(offloaded(folder, tmp_path / "work"))
    torch.testing.assert_close(train(model), train(plain), **EXACT)
    torch.testing.assert_close(logits(model), logits(plain), **EXACT)
    model.save_pretrained(tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "plain")
    got, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "plain"))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


# transformers below 5.23 says so of any offloaded model.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device:UserWarning")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("offloaded", BASES)
def test_loading_and_generating(offloaded, low_cpu_mem_usage, folder, tmp_path):
    """A trained adapter gives what it gives on the base in memory; the base's checkpoint isn't written to."""
    plain = strengthen(adapt(LlamaForCausalLM.from_pretrained(folder), modules_to_save=None)).eval()
    plain.save_pretrained(tmp_path / "adapter")
    checkpoint = (folder / "model.safetensors").read_bytes()
    base = offloaded(folder, tmp_path / "work")
    device_map = getattr(base, "hf_device_map", None)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(model), logits(plain), **EXACT)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))
    assert (folder / "model.safetensors").read_bytes() == checkpoint
    assert getattr(base, "hf_device_map", None) == device_map
    assert any(p.is_meta for p in base.parameters())
    model.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(plain), **EXACT)
    torch.testing.assert_close(logits(model.unload()), logits(LlamaForCausalLM.from_pretrained(folder)), **EXACT)


def test_a_refused_adapter_leaves_the_base_dispatched(folder, tmp_path):
    """It goes on giving what it gave."""
    adapt(LlamaForCausalLM.from_pretrained(folder), modules_to_save=None).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    base = partly_on_disk(folder, tmp_path / "work")
    before = logits(base)
    with pytest.raises(Exception, match=r"(?i)header"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base), before, **EXACT)
    assert base.hf_device_map == PARTS


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_lstta_in_offloaded_towers(low_cpu_mem_usage, tmp_path):
    """Blocks have no weight of their own by which PEFT could tell where they run."""
    plain = lstta_adapted()
    plain.save_pretrained(tmp_path)
    inputs = composite_batch()
    base = cpu_offload(composite(), execution_device=CPU)
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same(composite_result(model, inputs), composite_result(plain, inputs))
    trained = get_peft_model(cpu_offload(composite(), execution_device=CPU), LsttaConfig(r=8, num_heads=2))
    trained(**inputs)["logits"].sum().backward()
    assert all(p.grad is not None and not p.is_meta for p in trained.parameters() if p.requires_grad)


def test_what_is_brought_as_a_whole_is_refused(folder):
    """Blocks whose weights come all at once, by name, would take the adapter's along."""
    base = cpu_offload(
        LlamaForCausalLM.from_pretrained(folder), execution_device=CPU, preload_module_classes=["LlamaMLP"]
    )
    with pytest.raises(ValueError, match="without `preload_module_classes`"):
        adapt(base, modules_to_save=None)


def test_tokens_of_offloaded_embeddings_are_refused(folder):
    """Their weights can't be read outside of a call."""
    base = cpu_offload(LlamaForCausalLM.from_pretrained(folder), execution_device=CPU)
    before = logits(base)
    with pytest.raises(ValueError, match=r"(?i)offloaded"):
        adapt(base, modules_to_save=None, trainable_token_indices=[3])
    torch.testing.assert_close(logits(base), before, **EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_trained_stay_tied(tied, tmp_path):
    """The head shares the trained copy where the base's are tied, and both lie where they run."""

    def tied_base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **sizes))

    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    quiet = contextlib.nullcontext() if tied else pytest.warns(UserWarning, match="tied")
    with quiet:
        plain, model = adapt(tied_base(), **options), adapt(cpu_offload(tied_base(), execution_device=CPU), **options)
    torch.testing.assert_close(train(model), train(plain), **EXACT)
    torch.testing.assert_close(logits(model), logits(plain), **EXACT)
    plain.save_pretrained(tmp_path)
    with quiet:
        loaded = PeftModel.from_pretrained(cpu_offload(tied_base(), execution_device=CPU), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(plain), **EXACT)
