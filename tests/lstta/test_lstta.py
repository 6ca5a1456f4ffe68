"""LSTTA as a method of PEFT: injection, several adapters, saving and loading, unloading, and what it refuses."""

import pytest
import torch
from lstta_models import (
    EXACT,
    INPUTS,
    TOWERS,
    Composite,
    adapted,
    adapter_parameters,
    assert_other,
    assert_same,
    batch_of,
    blocks_of,
    composite,
    result,
    states_of,
    strengthen,
)
from peft import PeftConfig, PeftType, get_peft_model, inject_adapter_in_model
from torch import nn
from trimodal_families import tower

from peft_read import LsttaConfig, LsttaModel
from peft_read.lstta.adapter import LsttaAdapter


OTHER_INPUTS = batch_of(seed=1)


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


def test_injection_without_a_peft_model():
    """`inject_adapter_in_model` is enough: nothing that the layers need lives on the tuner."""
    base = composite()
    model = inject_adapter_in_model(LsttaConfig(r=8, num_heads=2, window=2), base)
    strengthen(model)
    assert_same(result(model, INPUTS), result(adapted(), INPUTS))


def test_public_names():
    """The tuner is registered under its type."""
    assert isinstance(adapted(strong=False).base_model, LsttaModel)


@pytest.mark.parametrize(("act_fn", "function"), [("gelu", nn.functional.gelu), ("relu", nn.functional.relu)])
def test_the_activation_of_the_bottleneck(act_fn, function):
    """Between the way down and the projections, written out."""
    torch.manual_seed(0)
    adapter = LsttaAdapter(8, LsttaConfig(r=4, num_heads=2, act_fn=act_fn), judges_frames=False)
    hidden = torch.randn(2, 3, 8)
    down = nn.functional.layer_norm(hidden, (8,), adapter.normalizer.weight, adapter.normalizer.bias)
    down = down @ adapter.downward.weight.T + adapter.downward.bias
    expected = function(down) @ adapter.projections.weight.T + adapter.projections.bias
    torch.testing.assert_close(adapter.project(hidden), expected)
