"""Configurations that only a model shows to be odd: what backtracks without end, is too wide, or names no block."""

import time

import pytest
from helpers import adapted
from models import base_model, classifier
from peft import PeftModel, get_peft_model

from peft_read import ReadConfig
from peft_read.tuners.checks import MOST_NAMES


ENDLESS = r"([a-z._0-9]+)+!"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_modules": rf"(?i){ENDLESS}"}, "target_modules"),
        ({"exclude_modules": ENDLESS}, "exclude_modules"),
        ({"rank_pattern": {ENDLESS: 4}}, "rank_pattern"),
        ({"layers_to_transform": 0, "layers_pattern": ENDLESS}, "layers_pattern"),
    ],
)
def test_an_expression_that_backtracks_without_end_is_refused(fields, field):
    """In seconds, by the name of the field, and nothing of the model is changed."""
    base = base_model("bert")
    modules, start = [type(module) for module in base.modules()], time.process_time()
    with pytest.raises(ValueError, match=f"`{field}` is a regular expression that takes more than 1 s"):
        get_peft_model(base, ReadConfig(r=4, **fields))
    assert time.process_time() - start < 2
    assert [type(module) for module in base.modules()] == modules


@pytest.mark.parametrize("pattern", [r".*layer\.(0|1)\.output\.dense", r"(.*\.)*output\.(dense|none)"])
def test_usual_expressions_are_none_of_them(pattern):
    """Repetitions and choices as people write them."""
    assert get_peft_model(base_model("bert"), ReadConfig(r=4, target_modules=pattern)).targeted_module_names


def test_an_expression_that_can_not_stand_in_another():
    """PEFT puts `rank_pattern` into an expression of its own, where flags can't stand."""
    with pytest.raises(ValueError, match="`rank_pattern` can't stand in"):
        get_peft_model(base_model("bert"), ReadConfig(r=4, rank_pattern={"(?i)dense": 2}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2000}, r"`r=2000` is wider than the 32 features of encoder\.layer\.0\.output\.dense.*at most 1024"),
        ({"rank_pattern": {"layer.1.output.dense": 1025}}, r"`rank_pattern\['layer.1.output.dense'\]=1025` is wider"),
        ({"layers_to_transform": [0, 7]}, r"`layers_to_transform` names the blocks \[7\].*indices \[0, 1\]"),
        ({"layers_to_transform": 2, "target_modules": ["output.dense"]}, r"names the blocks \[2\]"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(fields, message):
    """Before a weight is made."""
    base = base_model("bert")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ReadConfig(**{"r": 4} | fields))
    assert not hasattr(base, "peft_config")


def test_as_many_names_as_are_allowed_are_quick():
    """As many names as are allowed, of which one is there."""
    start = time.process_time()
    names = [f"module{n}.dense" for n in range(MOST_NAMES - 1)]
    model = get_peft_model(base_model("bert"), ReadConfig(r=4, target_modules=[*names, "output.dense"]))
    assert "encoder.layer.1.output.dense" in model.targeted_module_names
    assert time.process_time() - start < 10


def test_a_refused_adapter_beside_another():
    """The one that is there goes on, under its name alone."""
    model = adapted("bert")
    with pytest.raises(ValueError, match=r"leaves nothing to adapt"):
        model.add_adapter("second", ReadConfig(r=4, layers_to_transform=[9]))
    assert list(model.peft_config) == ["default"]
    assert not any(".second." in name for name, _ in model.named_parameters())


def test_a_module_to_train_that_is_none_is_told(tmp_path):
    """A mistyped head isn't trained, which no error would show; PEFT itself tells of other names."""
    told = "`modules_to_save` names 'poler', which is no module of this BertModel: it isn't trained"
    with pytest.warns(UserWarning, match=told):
        model = get_peft_model(base_model("bert"), ReadConfig(r=4, modules_to_save=["pooler", "poler"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=told):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)


def test_what_peft_adds_for_a_task_is_no_mistake():
    """Names of heads, of which a model has one."""
    get_peft_model(classifier(), ReadConfig(r=4, task_type="SEQ_CLS"))
