"""Saving and loading LSTTA: keys, names, processes, files that don't fit, copies."""

import copy
import json
import pickle

import pytest
import torch
from fresh import run_code
from lstta_models import (
    CLOSE,
    INPUTS,
    adapted,
    adapter_parameters,
    assert_same,
    batch_of,
    blocks_of,
    composite,
    result,
    states_of,
    strengthen,
)
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from trimodal_families import WIDTH


WEIGHTS = "adapter_model.safetensors"


FIRST = "base_model.model.vision_model.layers.0.lstta_adapter"


PICKLABLE = ("swin", "ast", "bert")  # weight normalisation, as in wav2vec 2.0, isn't


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"text": ["encoder.layers.0"]}}, "has no block 'encoder.layers.0'"),
        ({"num_levels": 5}, "more than the shallowest tower has blocks: .*'vision': 4"),
    ],
)
def test_layers_that_do_not_fit_are_refused(options, message):
    """Before anything is wrapped."""
    base = composite()
    with pytest.raises(ValueError, match=message):
        adapted(base=base, **options)
    assert not blocks_of(base)


@pytest.fixture
def saved(tmp_path):
    adapted(modules_to_save=["classifier"]).save_pretrained(tmp_path)
    return tmp_path


def test_saved_keys_and_shapes(saved):
    """The literal content of a file: a change of format is a decision, not an accident."""
    tensors = load_file(saved / WEIGHTS)
    linear = {"downward": (8, WIDTH), "projections": (24, 8), "outward": (8, 8), "upward": (WIDTH, 8)}
    judge = {"projections": (24, 8), "context_query": (8, 8), "enlarger": (8, 8), "scorer": (1, 8)}
    wanted = {"normalizer.weight": (WIDTH,), "normalizer.bias": (WIDTH,)}
    for name, shape in linear.items():
        wanted |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    of_vision = wanted | {"judge.normalizer.weight": (8,), "judge.normalizer.bias": (8,)}
    for name, shape in judge.items():
        of_vision |= {f"judge.{name}.weight": shape, f"judge.{name}.bias": shape[:1]}
    got = {key: tuple(value.shape) for key, value in tensors.items()}
    for block, keys in (
        ("vision_model.layers.0", of_vision),
        ("audio_model.encoder.layers.3", wanted),
        ("text_model.encoder.layer.2", wanted),
    ):
        prefix = f"base_model.model.{block}.lstta_adapter."
        assert {k.removeprefix(prefix): v for k, v in got.items() if k.startswith(prefix)} == keys
    assert {k for k in got if "lstta" not in k} == {f"base_model.model.classifier.{n}" for n in ("weight", "bias")}
    assert len(got) == 4 * (len(of_vision) + 2 * len(wanted)) + 2
    saved_config = json.loads((saved / "adapter_config.json").read_text())
    assert saved_config["layers"]["text"] == [f"encoder.layer.{i}" for i in range(4)]
    assert saved_config["num_levels"] == 4
    assert "target_modules" not in saved_config


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_under_any_name(saved, name, low_cpu_mem_usage):
    """Nothing stays random, whatever the adapter is called now."""
    model = PeftModel.from_pretrained(composite(), saved, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(result(model, INPUTS), result(adapted(), INPUTS))
    assert not any(p.requires_grad for p in model.parameters())


def test_many_blocks_are_not_condensed(tmp_path):
    """PEFT shortens lists of 20 target modules and more to names that fit elsewhere as well."""
    depths = {"vision": 8, "audio": 7, "text": 9}
    model = adapted(base=composite(depths=depths))
    assert len(blocks_of(model)) == 21
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(composite(depths=depths), tmp_path)
    assert blocks_of(loaded) == blocks_of(model)
    assert_same(result(loaded, INPUTS), result(model, INPUTS))


def test_load_in_a_fresh_process(saved):
    """The package's import is all that a loader needs."""
    code = (
        "import peft_read, torch, sys\n"
        "from peft import PeftModel\n"
        "from lstta_models import composite, result, batch_of\n"
        f"model = PeftModel.from_pretrained(composite(), {str(saved)!r})\n"
        f"torch.save(result(model, batch_of()), {str(saved / 'result.pt')!r})\n"
    )
    run_code(code)
    assert_same(torch.load(saved / "result.pt"), result(adapted(), INPUTS), **CLOSE)


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.upward.bias"), r"missing: .*lstta_adapter\.default\.upward\.bias"),
        (lambda t: t.update({f"{FIRST}.more.weight": torch.zeros(2)}), r"unexpected: .*more\.weight"),
        (lambda t: t.update({f"{FIRST}.upward.weight": torch.zeros(3, 8)}), r"wrong shape: .*\(3, 8\) in the file"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_files_that_do_not_fit_are_refused(saved, change, message):
    """Nothing is loaded then."""
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(composite(), saved)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_lora_in_a_tower(tmp_path):
    """LoRA in a tower's linears and LSTTA around its blocks work together, and files hold their own weights."""
    base = composite()
    lora = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(lora, base.text_model)
    with_lora = result(base, INPUTS)
    model = adapted(base=base, strong=False)
    assert_same(result(model, INPUTS), with_lora)
    both = result(strengthen(model), INPUTS)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert keys
    assert all("lstta_adapter" in key for key in keys)
    assert_same(result(model.unload(), INPUTS), with_lora)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert_same(result(again, INPUTS), both)


def test_head_is_trained_and_saved(saved):
    """modules_to_save: the head goes with the adapter."""
    model = adapted(modules_to_save=["classifier"]).train()
    states = states_of(model(**INPUTS))
    states["logits"].sum().backward()
    head = [n for n, p in model.named_parameters() if p.grad is not None and "classifier" in n]
    assert head == [f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")]
    edit(saved, lambda t: t["base_model.model.classifier.bias"].fill_(7.0))
    loaded = PeftModel.from_pretrained(composite(), saved)
    torch.testing.assert_close(
        result(loaded, INPUTS)["logits"],
        result(adapted(), INPUTS)["logits"] - composite().classifier.bias + 7,
        **CLOSE,
    )


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(way, tmp_path):
    """A copy works and shares nothing, even after a forward."""
    model = adapted(PICKLABLE)
    wanted = result(model, inputs := batch_of(PICKLABLE))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
    assert_same(result(twin, inputs), wanted)
    result(twin, batch_of(PICKLABLE, seed=1))
    assert not torch.equal(twin.get_frame_importance()[0], model.get_frame_importance()[0])
