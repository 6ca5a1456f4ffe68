"""Adapters from strangers: what is in their files beside the adapter is refused, and the base stays as it was."""

import json

import lstta_models
import pytest
import torch
from helpers import ADD_ADAPTER, EXACT, adapted, batch_of, result
from models import base_model
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from peft_read import LsttaConfig, ReadConfig


WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class Read:
    """READ in a Llama."""

    config = staticmethod(lambda **fields: ReadConfig(**{"r": 4, "cell": "gru"} | fields))
    base = staticmethod(lambda: base_model("llama"))
    foreign = (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.base_layer.weight",
    )

    @staticmethod
    def outputs(model):
        return {"": result("llama", model, batch_of("llama"))}

    @staticmethod
    def trained():
        return adapted("llama", cell="gru")


class Lstta:
    """LSTTA in a composite of one's own."""

    config = staticmethod(lambda **fields: LsttaConfig(**{"r": 8, "num_heads": 2, "window": 2} | fields))
    base = staticmethod(lstta_models.composite)
    foreign = (
        "classifier.weight",
        "text_model.embeddings.word_embeddings.weight",
        "text_model.encoder.layer.0.base_layer.output.dense.weight",
    )

    @staticmethod
    def outputs(model):
        return lstta_models.result(model, lstta_models.batch_of())

    @staticmethod
    def trained():
        return lstta_models.adapted()


METHODS = [pytest.param(Read, id="read"), pytest.param(Lstta, id="lstta")]


def file_of(method, folder, change=None, **fields):
    """A saved adapter in which somebody changed the weights and fields of the configuration."""
    method.trained().save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    if change is not None:
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def from_pretrained(method, base, folder):
    PeftModel.from_pretrained(base, folder)


def load_second(method, base, folder):
    get_peft_model(base, method.config()).load_adapter(folder, "second")


def load_over_the_first(method, base, folder):
    get_peft_model(base, method.config()).load_adapter(folder, "default")


def set_in_peft_model(method, base, folder):
    set_peft_model_state_dict(get_peft_model(base, method.config()), load_file(folder / WEIGHTS))


def set_in_injected(method, base, folder):
    set_peft_model_state_dict(inject_adapter_in_model(method.config(), base), load_file(folder / WEIGHTS))


def load_by_transformers(method, base, folder):
    base.load_adapter(folder)


ANY = [from_pretrained, load_second, load_over_the_first, set_in_peft_model, set_in_injected]
WAYS = [(method, way) for method in (Read, Lstta) for way in ANY] + [(Read, load_by_transformers)]


def weights_of(model):
    return {key.replace(".base_layer.", ".").removeprefix(PREFIX): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_weights_of_the_base_are_refused(method, way, tmp_path):
    """Whatever an adapter's file holds of the base is named, and the base keeps its own."""
    for number, foreign in enumerate([*((key,) for key in method.foreign), method.foreign]):
        base = method.base()
        before = {key: value.clone() for key, value in base.state_dict().items()}

        def add(tensors, foreign=foreign, before=before):
            for key in foreign:
                tensors[PREFIX + key] = torch.zeros_like(before[key.replace(".base_layer", "")])

        folder = file_of(method, tmp_path / str(number), add)
        with pytest.raises(ValueError, match=rf"nothing was loaded[\s\S]*unexpected: .*{foreign[0]}"):
            way(method, base, folder)
        after = weights_of(base)
        assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_adapter_are_refused(method, tmp_path):
    """A file for the second adapter can't bring weights for the first."""
    model = method.trained()
    key = next(key for key in model.state_dict() if ".default." in key)
    folder = file_of(method, tmp_path, lambda tensors: tensors.update({key: torch.ones_like(model.state_dict()[key])}))
    before = method.outputs(model)
    with pytest.raises(ValueError, match=r"unexpected: .*default"):
        model.load_adapter(folder, "second")
    lstta_models.assert_same(method.outputs(model), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: (value * 10).to(torch.int8), "wrong type: .*int8"),
        (lambda value: value > 0, "wrong type: .*bool"),
        (lambda value: value.to(torch.complex64), "wrong type: .*complex64"),
        (lambda value: torch.full_like(value, torch.nan), "not finite"),
        (lambda value: torch.full_like(value, -torch.inf), "not finite"),
        (lambda value: torch.full_like(value, 1e300, dtype=torch.float64), "not finite"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(method, change, message, tmp_path):
    """One tensor is enough, and it is named; what float32 can hold is loaded, in whatever type it was saved."""

    def spoil(tensors):
        tensors[list(tensors)[-1]] = change(list(tensors.values())[-1])

    base = method.base()
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, file_of(method, tmp_path, spoil))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_types_load(dtype, tmp_path):
    """As they always did: a type is no fault as long as the numbers fit."""

    def cast(tensors):
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    model = PeftModel.from_pretrained(base_model("llama"), file_of(Read, tmp_path, cast))
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 0, "atol": 0.2}
    torch.testing.assert_close(Read.outputs(model)[""], Read.outputs(Read.trained())[""], **tolerance)


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def remove(folder):
    (folder / WEIGHTS).unlink()


def drop(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors.popitem()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spoil", [truncate, remove, drop])
@pytest.mark.filterwarnings("error:You are trying to modify a model with PEFT for a second time")
def test_a_refused_load_leaves_the_base_as_it_was(method, spoil, tmp_path):
    """Not even an untrained adapter that acts stays; the base can be adapted again, and what trained still trains."""
    folder = file_of(method, tmp_path / "bad", init_weights=False)
    spoil(folder)
    base = method.base()
    trains = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    before, modules = method.outputs(base), [type(module) for module in base.modules()]
    with pytest.raises(Exception, match=r"(?s)."):
        PeftModel.from_pretrained(base, folder)
    lstta_models.assert_same(method.outputs(base), before)
    assert [type(module) for module in base.modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == trains
    model = PeftModel.from_pretrained(base, file_of(method, tmp_path / "good")).eval()
    lstta_models.assert_same(method.outputs(model), method.outputs(method.trained()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spoil", [truncate, drop])
def test_a_refused_second_adapter_is_gone(method, spoil, tmp_path):
    """The first goes on as it was, and the second isn't there."""
    folder = file_of(method, tmp_path / "bad", init_weights=False)
    spoil(folder)
    model = method.trained()
    before = method.outputs(model)
    with pytest.raises(Exception, match=r"(?s)."):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert not any(".second" in name for name, _ in model.named_parameters())
    lstta_models.assert_same(method.outputs(model), before)


@ADD_ADAPTER
def test_a_refused_load_by_transformers_leaves_the_model_as_it_was(tmp_path):
    """`load_adapter` of a transformers model, whatever the configuration says."""
    base = base_model("llama")
    before = Read.outputs(base)
    folder = file_of(Read, tmp_path, init_weights=False)
    drop(folder)
    with pytest.raises(ValueError, match="missing"):
        base.load_adapter(folder)
    lstta_models.assert_same(Read.outputs(base), before)
    assert not hasattr(base, "peft_config")
    base.load_adapter(file_of(Read, tmp_path / "good"), adapter_name="other")
    lstta_models.assert_same(Read.outputs(base), Read.outputs(Read.trained()))


@ADD_ADAPTER
def test_transformers_loads_modules_that_were_saved_beside(tmp_path):
    """`modules_to_save` belongs to the adapter, by this way as well."""
    model = get_peft_model(base_model("llama"), Read.config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.eval().save_pretrained(tmp_path)
    base = base_model("llama")
    base.load_adapter(tmp_path)
    lstta_models.assert_same(Read.outputs(base), Read.outputs(model))


def test_a_missing_saved_module_is_named(tmp_path):
    """A configuration that promises a module whose weights aren't in the file."""
    folder = file_of(Read, tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"missing: .*lm_head\.weight"):
        PeftModel.from_pretrained(base_model("llama"), folder)


def test_embeddings_of_a_resized_vocabulary(tmp_path):
    """PEFT saves them; they are taken by a model that was resized likewise, and by no other."""
    base_model("llama").save_pretrained(tmp_path / "base")
    load = type(base_model("llama")).from_pretrained
    resized = load(tmp_path / "base")
    resized.resize_token_embeddings(60, mean_resizing=False)
    model = get_peft_model(resized, Read.config())
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    other = load(tmp_path / "base")
    other.resize_token_embeddings(60, mean_resizing=False)
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    lstta_models.assert_same(Read.outputs(loaded), Read.outputs(model.eval()))
    with pytest.raises(ValueError, match="embed_tokens"):
        PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")


def test_embeddings_that_are_the_models_own_are_no_fault(tmp_path):
    """`save_embedding_layers=True` puts what nobody trained into the file: it loads where it changes nothing."""
    model = Read.trained()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / WEIGHTS))
    lstta_models.assert_same(
        Read.outputs(PeftModel.from_pretrained(base_model("llama"), tmp_path)), Read.outputs(model)
    )


@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["../x", "", "/x", "a\\b", "C:x", "a\0b", "a.b"], ids=repr)
def test_a_name_that_is_a_path_is_refused(method, name, tmp_path):
    """Whoever gives it, before anything is changed."""
    base = method.base()
    with pytest.raises(ValueError, match="can't be named"):
        get_peft_model(base, method.config(), adapter_name=name)
    model = method.trained()
    with pytest.raises(ValueError, match="can't be named"):
        model.add_adapter(name, method.config())
    assert list(model.peft_config) == ["default"]
    folder = file_of(method, tmp_path)
    with pytest.raises(ValueError, match="can't be named"):
        PeftModel.from_pretrained(base, folder, adapter_name=name)
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add_weighted_adapter(["default"], [1.0], "sum"), "can't be combined into one"),
        (lambda m: m.merge_adapter(), "can't be merged"),
        (lambda m: m.merge_and_unload(), "can't be merged"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_linear_adapters_can_and_these_cannot(method, call, message):
    """One clear sentence each, and the adapter goes on."""
    model = method.trained()
    before = method.outputs(model)
    with pytest.raises(NotImplementedError, match=message):
        call(model)
    lstta_models.assert_same(method.outputs(model), before)


def test_scales_and_hot_swaps_are_for_lora(tmp_path):
    """PEFT's and transformers' own helpers refuse with a sentence that says so."""
    from peft.helpers import rescale_adapter_scale
    from peft.utils.hotswap import hotswap_adapter

    model = Read.trained()
    folder = file_of(Read, tmp_path)
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)lora"):
        hotswap_adapter(model, folder, "default")
    with pytest.raises(ValueError, match="hot-swapped"):
        base_model("llama").load_adapter(folder, hotswap=True)


@pytest.mark.parametrize("method", METHODS)
def test_states_go_round_through_state_dicts(method):
    """What `get_peft_model_state_dict` gives is what `set_peft_model_state_dict` takes."""
    model, other = method.trained(), get_peft_model(method.base(), method.config()).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    lstta_models.assert_same(method.outputs(other), method.outputs(model))
