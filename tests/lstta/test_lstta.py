"""LSTTA as a method of PEFT: injection, several adapters, saving and loading, unloading, and what it refuses."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from lstta_models import (
    CLOSE,
    EXACT,
    Composite,
    adapted,
    adapter_parameters,
    assert_other,
    assert_same,
    batch_of,
    composite,
    result,
    states_of,
    strengthen,
)
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from trimodal_families import BATCH, FRAMES, WIDTH, tower

from peft_read import LsttaConfig, LsttaModel
from peft_read.lockstep.coroutines import LockstepError
from peft_read.lstta.layer import LsttaLayer


TOWERS = ("vision", "audio", "text")
WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.vision_model.layers.0.lstta_adapter"
PICKLABLE = ("swin", "ast", "bert")  # weight normalisation, as in wav2vec 2.0, isn't
INPUTS = batch_of()
OTHER_INPUTS = batch_of(seed=1)


def blocks_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, LsttaLayer)]


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer"),
        ({"r": 12, "num_heads": 4}, "multiple of 2 \\* num_heads = 8"),
        ({"window": 1.5}, "`window` must be a positive integer"),
        ({"num_audio_windows": 0}, "`num_audio_windows` must be"),
        ({"num_levels": -1}, "`num_levels` must be"),
        ({"frame_filter": "yes"}, "`frame_filter` must be True or False"),
        ({"act_fn": "nothing"}, "`act_fn` must be one of"),
        ({"act_fn": "prelu"}, "no weights of its own"),
        ({"dropout": 1.0}, "`dropout` must be"),
        ({"scaling": float("nan")}, "`scaling` must be a finite number"),
        ({"layers": {"sound": ["a"]}}, "`layers` goes by 'vision', 'audio', 'text', got 'sound'"),
        ({"layers": {"text": "layer.0"}}, "must be a list of names"),
        ({"layers": {"text": ["a", "b"]}, "num_levels": 3}, "more than the 2 blocks"),
    ],
)
def test_bad_fields_are_refused_when_set(options, message):
    """Every message says which field, what it got and what it expected."""
    with pytest.raises(ValueError, match=message):
        LsttaConfig(**options)


def test_config_round_trip(tmp_path):
    """What is saved is what is loaded, by PEFT's own loader."""
    config = LsttaConfig(r=16, window=3, layers={"text": ["a", "b"]}, modules_to_save=["classifier"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LsttaConfig
    assert loaded.peft_type is PeftType["LSTTA"]
    assert loaded.to_dict() == config.to_dict()


# ---------------------------------------------------------------- injection


def test_identity_at_the_start():
    """New adapters change nothing, bit for bit."""
    assert_same(result(adapted(strong=False), INPUTS), result(composite(), INPUTS))


def test_only_adapters_are_trained():
    """The towers and the head stay frozen, and every adapter weight gets a gradient."""
    model = adapted().train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    outputs = states_of(model(**INPUTS))
    sum(outputs[tower].square().mean() for tower in TOWERS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained:
            assert parameter.grad.abs().max() > 0, name


def test_training_step_lowers_the_loss():
    """Training works from the identity on."""
    torch.manual_seed(0)
    model = adapted(strong=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(**INPUTS)["logits"], torch.tensor([0, 2]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("source", TOWERS)
def test_every_modality_reaches_the_others(source):
    """A change of one input changes all towers' outputs, and does not without adapters."""
    changed = INPUTS | {k: v for k, v in OTHER_INPUTS.items() if k in KEYS[source]}
    model = adapted()
    assert_other(result(model, changed), result(model, INPUTS), TOWERS)
    with model.disable_adapter():
        others = [tower for tower in TOWERS if tower != source]
        assert_same(result(model, changed), result(model, INPUTS), others)


KEYS = {"vision": ("pixel_values",), "audio": ("sound",), "text": ("input_ids",)}


def test_levels_are_spread_over_the_depth_of_each_tower():
    """Towers of other depths meet at the same fraction of their depth."""
    model = adapted(base=composite(depths={"vision": 6, "audio": 3, "text": 4}), strong=False)
    config = model.peft_config["default"]
    assert config.num_levels == 3
    assert [name.split("base_model.model.")[1] for name in blocks_of(model)] == [
        "vision_model.layers.1",
        "vision_model.layers.3",
        "vision_model.layers.5",
        "audio_model.encoder.layers.0",
        "audio_model.encoder.layers.1",
        "audio_model.encoder.layers.2",
        "text_model.encoder.layer.0",
        "text_model.encoder.layer.1",
        "text_model.encoder.layer.3",
    ]


def test_blocks_can_be_named():
    """Named blocks are taken as they are, the other towers' are found."""
    layers = {"text": ["encoder.layer.1", "encoder.layer.3"]}
    model = adapted(layers=layers, strong=False)
    config = model.peft_config["default"]
    assert config.num_levels == 2
    assert config.layers["text"] == layers["text"]
    assert config.layers["vision"] == [f"layers.{i}" for i in range(4)]
    assert [n.rpartition("text_model.")[2] for n in blocks_of(model) if "text_model" in n] == layers["text"]


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


def test_a_model_without_towers_is_refused():
    """The message says what to build, and how a composite of one's own takes part."""
    with pytest.raises(ValueError, match=r"TrimodalModel.*run_towers.*make_exchange = None"):
        get_peft_model(tower("bert"), LsttaConfig())


def test_a_single_tower_is_refused():
    """There is nobody to talk to."""
    with pytest.raises(ValueError, match=r"needs two or three towers.*has text of"):
        get_peft_model(Composite(text=tower("bert")), LsttaConfig())


def test_a_layer_of_a_missing_tower_is_refused():
    """An adapter for three towers doesn't go into two of them."""
    with pytest.raises(ValueError, match="has `layers` of a audio tower, but the Composite has only vision, text"):
        adapted(("vit", "bert"), layers={"audio": ["layers.0"]})


def test_names_that_contain_the_prefix_are_refused():
    """PEFT would mistake such modules' weights for adapters."""

    class Odd(Composite):
        def __init__(self, **towers):
            super().__init__(**towers)
            self.text_model.lstta_blocks = self.text_model.encoder.layer

    layers = {"text": [f"lstta_blocks.{i}" for i in range(4)]}
    with pytest.raises(ValueError, match="by 'lstta_' in their names"):
        adapted(base=Odd(vision=tower("vit"), text=tower("bert")), layers=layers)


def test_two_modalities_are_enough():
    """Towers that are missing at construction leave their part out."""
    for families in (("vit", "bert"), ("wav2vec2", "bert"), ("vit", "wav2vec2")):
        base, inputs = composite(families), batch_of(families)
        before = result(base, inputs)
        model = adapted(base=base)
        assert_other(result(model, inputs), before)


def test_one_modality_is_refused_at_forward():
    """The adapters would have nobody to talk to; without them the model runs."""
    model = adapted()
    inputs = {"pixel_values": INPUTS["pixel_values"]}
    with pytest.raises(ValueError, match=r"only vision.*two or three modalities"):
        model(**inputs)
    with model.disable_adapter():
        model(**inputs)


def test_a_tower_alone_is_plain():
    """Adapters act when the towers meet; a tower called by itself is the base's."""
    model = adapted()
    ids = INPUTS["input_ids"]
    got = model.base_model.model.text_model(ids).last_hidden_state
    torch.testing.assert_close(got, composite().text_model(ids).last_hidden_state, **EXACT)


# ---------------------------------------------------------------- switching


def test_disable_and_unload_give_the_base_bit_for_bit():
    """Also after training."""
    wanted = result(composite(), INPUTS)
    model = adapted()
    assert_other(result(model, INPUTS), wanted)
    with model.disable_adapter():
        assert_same(result(model, INPUTS), wanted)
    base = model.unload()
    assert_same(result(base, INPUTS), wanted)
    assert not blocks_of(base)
    assert base.make_exchange is None
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in composite().named_parameters()]


def test_another_adapter_after_unload():
    """Unloading leaves nothing that is in the way of the next one."""
    assert_same(result(adapted(base=adapted().unload()), INPUTS), result(adapted(), INPUTS))


def two_adapters(**options):
    model = adapted()
    model.add_adapter("second", LsttaConfig(**{"r": 12, "num_heads": 3, "window": 1} | options))
    return strengthen(model, "second", seed=1)


def test_switching_between_adapters():
    """Each of two adapters gives what it gives alone."""
    model = two_adapters()
    first = result(model, INPUTS)
    assert_same(first, result(adapted(), INPUTS))
    model.set_adapter("second")
    alone = adapted(r=12, num_heads=3, window=1, strong=False)
    assert_same(result(model, INPUTS), result(strengthen(alone, seed=1), INPUTS))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "second"))
    model.set_adapter("default")
    assert_same(result(model, INPUTS), first)


def test_active_adapters_add_up():
    """Two adapters of half the weight are one."""
    model = adapted(scaling=0.5)
    model.add_adapter("again", LsttaConfig(r=8, num_heads=2, window=2, scaling=0.5))
    strengthen(model, "again")
    model.base_model.set_adapter(["default", "again"])
    assert_same(result(model, INPUTS), result(adapted(), INPUTS), **CLOSE)


def test_adapters_of_other_levels_take_turns():
    """They may live in one model, but not act at once."""
    model = adapted()
    model.add_adapter("two", LsttaConfig(r=8, num_heads=2, num_levels=2))
    strengthen(model, "two")
    assert_same(result(model, INPUTS), result(adapted(), INPUTS))
    model.set_adapter("two")
    assert_same(result(model, INPUTS), result(adapted(num_levels=2, window=4), INPUTS))
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match=r"can't act together: at .* the same `num_levels` and `layers`"):
        model(**INPUTS)


def test_delete():
    """A deleted adapter leaves nothing behind."""
    model = two_adapters()
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not adapter_parameters(model)
    for module in model.modules():
        if isinstance(module, LsttaLayer):
            assert set(module.lstta_adapter) == set(module.levels) == {"second"}
    assert_same(result(model, INPUTS), result(strengthen(adapted(r=12, num_heads=3, window=1), seed=1), INPUTS))


def test_status():
    """PEFT's own bookkeeping sees the adapters."""
    model = two_adapters()
    status = model.get_model_status()
    assert (status.peft_types, status.active_adapters) == ({"default": "LSTTA", "second": "LSTTA"}, ["default"])
    assert status.num_adapter_layers == 12
    layer = model.get_layer_status()[0]
    assert layer.module_type == "lstta.LsttaLayer"
    assert layer.enabled
    assert layer.available_adapters == ["default", "second"]


def test_merging_is_refused_before_anything_is_touched():
    """In every way in which PEFT offers it."""
    model = adapted(modules_to_save=["classifier"])
    before = result(model, INPUTS)
    layer = model.get_submodule(blocks_of(model)[0])
    for attempt in (model.merge_and_unload, model.merge_adapter, layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match=r"LSTTA can't be merged.*`unload\(\)`"):
            attempt()
    assert_same(result(model, INPUTS), before)


def test_mixed_batches():
    """Each row of a batch with an adapter of its own, or none, gives what it gives there alone."""
    model = two_adapters()
    inputs = batch_of(batch=4)
    names = ["second", "__base__", "default", "second"]
    mixed = result(model, inputs | {"adapter_names": names})
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = result(model, inputs)
        else:
            model.set_adapter(name)
            alone = result(model, inputs)
        for key in alone:
            each = len(alone[key]) // 4
            rows = slice(row * each, (row + 1) * each)
            torch.testing.assert_close(mixed[key][rows], alone[key][rows], **CLOSE)
    with pytest.raises(ValueError, match="aren't there: \\['nobody'\\]"):
        model(**inputs, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="one adapter per sample: got 3 names"):
        model(**inputs, adapter_names=["default"] * 3)


# ---------------------------------------------------------------- saving and loading


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
    script = (
        "import peft_read, torch, sys\n"
        "from peft import PeftModel\n"
        "from lstta_models import composite, result, batch_of\n"
        f"model = PeftModel.from_pretrained(composite(), {str(saved)!r})\n"
        f"torch.save(result(model, batch_of()), {str(saved / 'result.pt')!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
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


# ---------------------------------------------------------------- forward


def test_frame_importance():
    """One tensor a level, in [0, 1], without a graph, of the last forward only."""
    model = adapted()
    model(**INPUTS)
    importance = model.get_frame_importance()
    assert [tuple(g.shape) for g in importance] == [(BATCH, FRAMES)] * 4
    assert all(((g >= 0) & (g <= 1)).all() and not g.requires_grad for g in importance)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model(**INPUTS, frame_mask=mask)
    masked = model.get_frame_importance()
    assert len(masked) == 4
    assert all(g[0, 3] == 0 and g[0, :3].min() > 0 for g in masked)
    torch.testing.assert_close(masked[0][1], importance[0][1], **CLOSE)


def test_frame_importance_is_forgotten():
    """It is of the last forward, not of one before."""
    model = adapted()
    model(**INPUTS)
    model(**{k: v for k, v in INPUTS.items() if k != "pixel_values"})
    with pytest.raises(ValueError, match="last forward was made without it or without `pixel_values`"):
        model.get_frame_importance()


def test_frame_importance_of_several_adapters():
    """Each adapter has its own."""
    model = two_adapters(frame_filter=False)
    model.base_model.set_adapter(["default", "second"])
    model(**INPUTS)
    assert len(model.get_frame_importance()) == 4
    with pytest.raises(ValueError, match=r"adapter 'second'.*frame_filter=False"):
        model.get_frame_importance("second")


def test_filter_can_be_left_out():
    """Without it the frames weigh alike, and there are fewer weights."""
    plain = adapted(frame_filter=False)
    assert not any("judge" in name for name in adapter_parameters(plain))
    assert_other(result(plain, INPUTS), result(adapted(), INPUTS), TOWERS)


def test_windows_matter():
    """A window of one frame and one of four give other results."""
    assert_other(result(adapted(window=1), INPUTS), result(adapted(window=4), INPUTS), TOWERS)


def changed_rows(got, wanted):
    """Rows of the first sample, `(rows, ...)`, that differ."""
    return {i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if not torch.equal(a, b)}


@pytest.mark.parametrize("frame_filter", [False, True])
def test_who_sees_a_change_of_one_frame(frame_filter):
    """Short-term: what is in its window, and text. Long-term: everything, through the importance of the frames."""
    # One level, after the last blocks, since within a tower everything sees everything.
    model = adapted(num_levels=1, frame_filter=frame_filter)
    pixels = INPUTS["pixel_values"].clone()
    pixels[0, 3] += 1
    got, wanted = result(model, INPUTS | {"pixel_values": pixels}), result(model, INPUTS)
    steps = wanted["audio"].shape[1]
    second_half = {step for step in range(steps) if (2 * step + 1) * FRAMES // (2 * steps) >= 2}
    everything = set(range(steps))
    assert changed_rows(got["vision"][:FRAMES], wanted["vision"][:FRAMES]) == (set(range(4)) if frame_filter else {3})
    heard = changed_rows(got["audio"][0], wanted["audio"][0])
    assert heard == (everything if frame_filter else second_half)
    assert changed_rows(got["text"][0], wanted["text"][0]) == set(range(9))
    assert_same({k: v[-1] for k, v in got.items()}, {k: v[-1] for k, v in wanted.items()})


def test_prefix_tokens_do_not_carry_masked_sound():
    """AST's two class tokens have seen the padding: nobody attends to them where there is some."""
    families = ("vit", "ast", "bert")
    model, inputs = adapted(families, num_levels=1), batch_of(families)
    block = model.base_model.model.audio_model.layers[3].base_layer

    def results(strength, mask):
        def replace(_, __, output):
            output[:, :2] += strength * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
            return output

        handle = block.register_forward_hook(replace)
        got = result(model, inputs | {"audio_mask": mask})
        handle.remove()
        return got

    mask = torch.ones(BATCH, inputs["sound"].shape[1], dtype=torch.bool)
    assert_other(results(5.0, mask), results(0.0, mask), ["vision", "text"])
    mask[:, -20:] = False
    assert_same(results(5.0, mask), results(0.0, mask), ["vision", "text"])


def watch_layers(model):
    """What each adapted block gives, by its name, as soon as the model has run; and the hooks to remove."""
    seen = {}

    def watch(name):
        return lambda _, __, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LsttaLayer)}
    return seen, [module.register_forward_hook(watch(name)) for name, module in layers.items()]


def test_hidden_states_show_the_adapted_stream():
    """`output_hidden_states` holds what the next block gets, installed before or after the adapter."""
    for base_first in (True, False):
        base = composite()
        if base_first:
            base(**INPUTS, output_hidden_states=True)
        model = adapted(base=base)
        seen, handles = watch_layers(model)
        outputs = model(**INPUTS, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        for tower_name in TOWERS:
            states = outputs[tower_name].hidden_states
            adapted_states = [state for name, state in seen.items() if f".{tower_name}_model." in name]
            assert len(states) == len(adapted_states) + 1
            for got, wanted in zip(states[1:-1], adapted_states, strict=False):
                assert got is wanted


def checkpoint_blocks(model, use_reentrant):
    """transformers has renamed the method."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("families", [("vit", "wav2vec2", "bert"), ("swin", "ast", "roberta")], ids="+".join)
@pytest.mark.parametrize("use_reentrant", [True, False])
# Of the blocks before the first adapter, which have nothing to train.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_gradient_checkpointing(families, use_reentrant):
    """The same gradients, also where a tower would checkpoint whole stages; and the switch is put back."""
    model, inputs = adapted(families).train(), batch_of(families)
    towers = [model.base_model.model.get_submodule(f"{name}_model") for name in TOWERS]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            for each in towers:
                checkpoint_blocks(each, use_reentrant)
        sum(states.square().mean() for states in states_of(model(**inputs)).values()).backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    if families[0] == "swin":
        stages = model.base_model.model.vision_model.encoder.layers
        assert not any(stage.gradient_checkpointing for stage in stages)
        model.unload()
        assert all(stage.gradient_checkpointing for stage in stages)


def test_a_failing_tower_leaves_no_half_run_state():
    """The error names its tower, and the model works as before."""
    model = adapted()
    wanted = result(model, INPUTS)
    block = model.base_model.model.audio_model.encoder.layers[2]

    def fail(*_):
        raise RuntimeError("no more sound")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more sound") as caught:
        model(**INPUTS)
    assert any("audio tower" in note for note in caught.value.__notes__)
    handle.remove()
    assert_same(result(model, INPUTS), wanted)


def test_a_failing_exchange_leaves_no_half_run_state(monkeypatch):
    """An error in an adapter ends the forward as one in a tower does."""
    model = adapted()
    wanted = result(model, INPUTS)
    with monkeypatch.context() as patch:
        patch.setattr("peft_read.lstta.exchange.interact", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**INPUTS)
    assert_same(result(model, INPUTS), wanted)


def test_half_precision_towers():
    """Adapters are float32 in bfloat16 towers, and compute so."""
    model = adapted(base=composite().bfloat16())
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in INPUTS.items()}
    outputs = result(model, inputs)
    assert {x.dtype for x in outputs.values()} == {torch.bfloat16}
    wanted = result(adapted(), INPUTS)
    for name in TOWERS:
        assert (outputs[name].float() - wanted[name]).abs().mean() < 0.1 * wanted[name].abs().mean()


def test_autocast():
    """Under autocast the towers run in bfloat16, the adapters in float32, and gradients are float32."""
    model = adapted().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = states_of(model(**INPUTS))
    sum(x.float().square().mean() for x in outputs.values()).backward()
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    exact = result(model, INPUTS)
    for name in TOWERS:
        assert (outputs[name].float() - exact[name]).abs().mean() < 0.1 * exact[name].abs().mean()


def test_weights_in_half_precision():
    """Without PEFT's upcast, as in transformers' `add_adapter`, weights are the base's and the computing float32."""
    model = get_peft_model(
        composite().bfloat16(), LsttaConfig(r=8, num_heads=2, window=2), autocast_adapter_dtype=False
    ).eval()
    strengthen(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in INPUTS.items()}
    twin = adapted(base=composite().bfloat16())
    with torch.no_grad():
        for name, parameter in adapter_parameters(twin).items():
            parameter.copy_(adapter_parameters(model)[name])
    assert_same(result(model, inputs), result(twin, inputs))


def test_dropout_in_training_only():
    """The adapter's dropout acts on its output, in training."""
    model = adapted(dropout=0.5)
    wanted = result(model, INPUTS)
    assert_same(wanted, result(adapted(), INPUTS))
    model.train()
    torch.manual_seed(0)
    first = result(model, INPUTS)
    assert_other(first, wanted, TOWERS)
    torch.manual_seed(0)
    assert_same(result(model, INPUTS), first)


def test_threads_share_a_model():
    """Concurrent forwards don't meet each other's towers."""
    model = adapted()
    batches = [batch_of(seed=seed) for seed in range(4)]
    wanted = [result(model, batch) for batch in batches]
    got = [None] * 4

    def run(i):
        for _ in range(3):
            got[i] = result(model, batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, expected in zip(got, wanted, strict=True):
        assert_same(each, expected, **CLOSE)


def test_no_graph_is_kept():
    """Nothing holds on to the activations of a forward."""
    model = adapted().train()
    outputs = states_of(model(**INPUTS))
    sum(x.sum() for x in outputs.values()).backward()
    exchange = model.base_model.model.make_exchange
    assert all(not g.requires_grad and g.grad_fn is None for levels in exchange.importance.values() for g in levels)
    kept = {name for name, value in vars(exchange).items() if not isinstance(value, int)}
    assert kept == {"importance", "stages", "listeners", "_switched_off"}


def test_recomputing_around_a_block_is_refused():
    """A checkpoint around an adapted block would run it again without the other towers."""
    model = adapted().train()
    block = model.base_model.model.text_model.encoder.layer[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    with pytest.raises(LockstepError, match="checkpoint"):
        sum(x.sum() for x in states_of(model(**INPUTS)).values()).backward()


def test_injection_without_a_peft_model():
    """`inject_adapter_in_model` is enough: nothing that the layers need lives on the tuner."""
    base = composite()
    model = inject_adapter_in_model(LsttaConfig(r=8, num_heads=2, window=2), base)
    strengthen(model)
    assert_same(result(model, INPUTS), result(adapted(), INPUTS))


def test_public_names():
    """The tuner is registered under its type."""
    assert isinstance(adapted(strong=False).base_model, LsttaModel)
