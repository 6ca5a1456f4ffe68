"""Several adapters of LSTTA: switching, adding up, mixing in a batch, deleting, unloading."""

import pytest
import torch
from lstta_models import (
    CLOSE,
    INPUTS,
    adapted,
    adapter_parameters,
    assert_other,
    assert_same,
    batch_of,
    blocks_of,
    composite,
    result,
    strengthen,
    two_adapters,
)

from peft_read import LsttaConfig
from peft_read.lstta.layer import LsttaLayer


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
