"""Which modules are adapted, with which width: every way in which PEFT's users say so."""

import pytest
import torch
from helpers import EXACT, adapted, batch_of, result, strengthen
from models import FAMILIES, HEADS, LAYERS, WIDTH, base_model, classifier
from peft import get_peft_model
from torch import nn

from peft_read import ReadConfig, find_feed_forward_outputs
from peft_read.read.layer import ReadLayer


BERT_LINEARS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT_LINEARS += ["intermediate.dense", "output.dense"]


def targets(family, **options):
    return get_peft_model(base_model(family), ReadConfig(r=4, **options)).targeted_module_names


@pytest.mark.parametrize("family", FAMILIES)
def test_find_feed_forward_outputs(family):
    """The public function names what the default adapts, in the order of the model."""
    assert find_feed_forward_outputs(base_model(family)) == list(FAMILIES[family].targets)


def test_find_feed_forward_outputs_in_a_part_of_another_module():
    """Names are relative to the module that is asked, and a module of no known type has none."""
    pair = nn.ModuleDict({"left": base_model("bert"), "right": base_model("llama")})
    expected = [f"left.{name}" for name in FAMILIES["bert"].targets]
    expected += [f"right.{name}" for name in FAMILIES["llama"].targets]
    assert find_feed_forward_outputs(pair) == expected
    assert find_feed_forward_outputs(nn.Linear(1, 1)) == []


@pytest.mark.parametrize(
    ("wanted", "layers"), [(0, [0]), (1, [1]), ([0], [0]), ([1, 0], [0, 1]), ([], [0, 1]), (None, [0, 1])]
)
@pytest.mark.parametrize("family", ["bert", "bart", "gpt2", "clip"])
def test_layers_to_transform_with_the_default_targets(family, wanted, layers):
    """An index, 0 included, or several; in every tower and stack."""
    expected = [name for name in FAMILIES[family].targets if any(f".{i}." in name for i in layers)]
    assert targets(family, layers_to_transform=wanted) == expected


@pytest.mark.parametrize("pattern", [None, "layer", ["layer"]])
def test_layers_to_transform_with_a_list_of_targets(pattern):
    """PEFT's own rule, and the same with the name of the list of blocks."""
    expected = ["encoder.layer.1.output.dense"]
    for given in (["output.dense"], None):
        found = targets("bert", target_modules=given, layers_to_transform=[1], layers_pattern=pattern)
        assert [name for name in found if "attention" not in name] == expected


def test_layers_that_are_not_there_are_refused():
    """The message says which there are."""
    with pytest.raises(ValueError, match=r"layers_to_transform=\[7\].*\[0, 1\]"):
        targets("bert", layers_to_transform=[7])


def test_target_modules_as_a_list_and_as_a_regular_expression():
    """Names or endings of names in a list, whole names in an expression."""
    assert targets("llama", target_modules=["down_proj"]) == list(FAMILIES["llama"].targets)
    assert targets("llama", target_modules=r"model\.layers\.1\.mlp\.(up|gate)_proj") == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize("exclude", [["layer.0.output.dense"], r"encoder\.layer\.0\..*"])
def test_exclude_modules(exclude):
    """Excluding works for explicit targets and for the defaults."""
    assert targets("bert", exclude_modules=exclude) == ["encoder.layer.1.output.dense"]
    found = targets("bert", target_modules=["output.dense"], exclude_modules=exclude)
    assert "encoder.layer.0.output.dense" not in found
    assert "encoder.layer.1.output.dense" in found


def test_rank_pattern():
    """A width of their own for some modules, by name or by regular expression, also after saving."""
    config = ReadConfig(r=4, rank_pattern={"layer.0.output.dense": 2, r".*\.attention\.output\.dense": 3})
    config.target_modules = {"output.dense"}
    model = get_peft_model(base_model("bert"), config)
    found = {m.module_name: m.r["default"] for m in model.modules() if isinstance(m, ReadLayer)}
    assert found == {
        "encoder.layer.0.attention.output.dense": 3,
        "encoder.layer.0.output.dense": 2,
        "encoder.layer.1.attention.output.dense": 3,
        "encoder.layer.1.output.dense": 4,
    }
    for module in model.modules():
        if isinstance(module, ReadLayer):
            assert module.read_downward["default"].weight.shape == (found[module.module_name], WIDTH)


def test_all_linear():
    """Every linear layer of the blocks, and, where there is one, not the head."""
    found = targets("bert", target_modules="all-linear")
    blocks = [f"encoder.layer.{i}.{name}" for i in range(LAYERS) for name in BERT_LINEARS]
    assert found == [*blocks, "pooler.dense"]
    model = get_peft_model(classifier(), ReadConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert not any("classifier" in name for name in model.targeted_module_names)
    assert not any("lm_head" in name for name in targets("llama", target_modules="all-linear"))


def test_all_linear_computes():
    """Attention projections, wider layers and the pooler as well; identity at the start, other output when trained."""
    base, batch = base_model("bert"), batch_of("bert")
    expected = result("bert", base, batch)
    # The pooler sees one token of each row, which no mask of the sequence is about.
    config = ReadConfig(r=4, cell="gru", target_modules="all-linear", exclude_modules=["pooler.dense"])
    model = get_peft_model(base, config)
    torch.testing.assert_close(result("bert", model, batch), expected, **EXACT)
    assert (result("bert", strengthen(model), batch) - expected).abs().max() > 0.1


@pytest.mark.parametrize("first", ["all-linear", None, ["query"]])
def test_a_second_adapter_with_all_linear(first):
    """Layers that are wrapped already count as linear: the second adapter gets all of them again."""
    expected = targets("bert", target_modules="all-linear")
    model = get_peft_model(base_model("bert"), ReadConfig(r=4, target_modules=first))
    model.add_adapter("second", ReadConfig(r=2, target_modules="all-linear"))
    second = [m.module_name for m in model.modules() if isinstance(m, ReadLayer) and "second" in m.r]
    assert second == expected


def test_all_linear_knows_gpt2s_convolutions():
    """GPT-2's `Conv1D` is a linear layer by another name."""
    found = targets("gpt2", target_modules="all-linear")
    assert found == [
        f"transformer.h.{i}.{name}"
        for i in range(LAYERS)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


@pytest.mark.parametrize("heads", [["down"], ["up"], ["score"], ["classifier"], ["head"], ["rnn"], ["gru"]])
def test_heads_of_any_name_are_not_looked_for_in_adapters(heads):
    """PEFT finds `modules_to_save` by the ends of names: none of ours ends in what users call their heads."""
    (name,) = heads
    model = base_model("bert")
    model.add_module(name, nn.Linear(WIDTH, HEADS))
    wrapped = get_peft_model(model, ReadConfig(r=4, cell="gru", modules_to_save=heads))
    saved = [n for n, _ in wrapped.named_modules() if n.endswith("modules_to_save")]
    assert saved == [f"base_model.model.{name}.modules_to_save"]
    result("bert", wrapped, batch_of("bert"))
    wrapped.add_adapter("second", ReadConfig(r=4, modules_to_save=heads))
    assert [n for n, _ in wrapped.named_modules() if n.endswith("modules_to_save")] == saved


class PackedLinear(nn.Module):
    """A quantised linear layer: integers of no telling shape, and the sizes as attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.abs().max()) / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).flatten()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale
        return nn.functional.linear(x, weight, self.bias)


def test_quantised_layers():
    """Sizes come from the layer's attributes, and adapter weights are floating point whatever the base's are."""
    base, batch = base_model("bert"), batch_of("bert", padding="left")
    for block in base.encoder.layer:
        block.output.dense = PackedLinear(block.output.dense)
    expected = result("bert", base, batch)
    model = get_peft_model(base, ReadConfig(r=4, cell="gru"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(result("bert", model, batch), expected, **EXACT)
    assert (result("bert", strengthen(model), batch) - expected).abs().max() > 0.1


def test_targets_of_a_saved_adapter_are_found_again():
    """Fully written names, as the defaults are saved, hit no other module."""
    model = adapted("bart")
    again = get_peft_model(base_model("bart"), ReadConfig(target_modules=list(model.targeted_module_names)))
    assert again.targeted_module_names == list(FAMILIES["bart"].targets)
