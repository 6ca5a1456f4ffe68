"""Which parts of a model FSDP shards: what the tuners tell Accelerate, transformers and PEFT."""

import functools
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from devices import three_towers
from helpers import CLOSE, adapted, batch_of, result
from models import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from peft_read import ReadConfig
from peft_read.lstta.layer import LsttaLayer


@pytest.fixture
def sharding(monkeypatch):
    """As in a process that Accelerate has started for FSDP, with no other one."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def accelerator():
    """What Accelerate's functions need to know, by the policy of `examples/accelerate/fsdp2.yaml`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True)


def shard(model):
    """Accelerate's own wrapping."""
    return fsdp2_prepare_model(accelerator(), model)


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


def test_checkpoints_are_in_the_layers_where_towers_meet(monkeypatch):
    """FSDP's activation checkpointing goes by the same names; towers don't meet when a layer is computed again."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model, known = three_towers(), accelerator()
    known.state.fsdp_plugin.set_auto_wrap_policy(model)
    fsdp2_apply_ac(known, model)
    layers = [module for module in model.modules() if isinstance(module, LsttaLayer)]
    assert len(layers) == 6
    assert all(isinstance(layer.base_layer, CheckpointWrapper) for layer in layers)
    inside = [m._checkpoint_wrapped_module for m in model.modules() if isinstance(m, CheckpointWrapper)]
    assert not any(isinstance(module, LsttaLayer) for module in inside)


class Plain(nn.Module):
    """A model that says nothing of its blocks."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU())  # noqa: E731
        layer = functools.partial(nn.TransformerEncoderLayer, 8, 2, batch_first=True)
        self.stages = nn.ModuleList(nn.ModuleList(layer() for _ in range(2)) for _ in "ab")
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
