"""Which parts of a model FSDP shards: what the tuners tell Accelerate, transformers and PEFT."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from devices import three_towers
from helpers import CLOSE, adapted, batch_of, result
from models import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from peft_read import ReadConfig


@pytest.fixture
def sharding(monkeypatch):
    """As in a process that Accelerate has started for FSDP, with no other one."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(model):
    """Accelerate's own wrapping, by the policy of `examples/accelerate/fsdp2.yaml`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    return fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=True), model)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip"])
def test_accelerate_shards_every_family(family, sharding):
    """All weights, more than one unit, and the outputs stay."""
    model, batch = adapted(family), batch_of(family)
    expected = result(family, model, batch)
    model = shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
    torch.testing.assert_close(result(family, model, batch), expected, **CLOSE)


def test_a_scalar_is_torch_s_to_refuse(sharding):
    """CLIP's scale of the logits."""
    with pytest.raises(ValueError, match=r"scalar parameters\. Change logit_scale"):
        shard(adapted("clip"))


def test_the_fault_that_the_list_prevents(sharding):
    """Control: BERT's own list names its embeddings, of which Accelerate shards a part by itself."""
    base = adapted("bert").unload()
    assert "BertEmbeddings" in base._no_split_modules
    with pytest.raises((TypeError, ValueError, AssertionError)):
        shard(get_peft_model(base, LoraConfig(target_modules=["query"])))


def test_blocks_of_towers_not_their_layers(monkeypatch):
    """Activation checkpointing goes by the same names, and mustn't be around the layers in which towers meet."""
    model = three_towers()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert {"ViTLayer", "ASTLayer", "BertLayer"} <= set(model._no_split_modules)
    assert not {"LsttaLayer", "BertEmbeddings"} & set(model._no_split_modules)


class Plain(nn.Module):
    """A model that says nothing of its blocks."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU())  # noqa: E731
        self.stages = nn.ModuleList(nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2)) for _ in "ab")
        self.tail = nn.ModuleList(block() for _ in range(2))


def test_a_model_that_says_nothing(monkeypatch):
    """The innermost blocks around what is adapted."""
    model = get_peft_model(Plain(), ReadConfig(r=4, target_modules=["linear2"]))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert model._no_split_modules == ["TransformerEncoderLayer"]


def test_without_fsdp_nothing_changes(monkeypatch):
    """A map of devices goes by the model's own list."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    model = adapted("bert")
    assert model._no_split_modules == model.get_base_model()._no_split_modules
    assert model.get_input_embeddings() is model.get_base_model().embeddings.word_embeddings
    plain = get_peft_model(Plain(), ReadConfig(r=4, target_modules=["linear2"]))
    assert not any(hasattr(plain, name) for name in ("_no_split_modules", "get_input_embeddings"))
