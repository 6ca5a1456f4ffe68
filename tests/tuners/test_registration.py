"""READ as a member of PEFT's registry: found by name, once, and never in the place of a method of PEFT's own."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import peft
import pytest
from helpers import adapted
from models import base_model
from peft import PeftConfig, PeftModel, PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor

import peft_read
from peft_read import (
    ReadConfig,
    TrimodalConfig,
    TrimodalForSequenceClassification,
    TrimodalModel,
    TrimodalProcessor,
)
from peft_read.cards.overrides import install as install_cards
from peft_read.read.model import ReadModel


MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
FULL = ReadConfig(
    r=7,
    cell="lstm",
    bidirectional=True,
    act_fn="relu",
    dropout=0.25,
    scaling=0.5,
    recur_over="frames",
    num_frames=8,
    target_modules=["b", "a", "c"],
    exclude_modules=["y", "x"],
    layers_to_transform=[1, 0],
    layers_pattern="layers",
    rank_pattern={"a": 3},
    modules_to_save=["head"],
    init_weights=False,
    task_type="FEATURE_EXTRACTION",
)


@pytest.fixture
def registry():
    """What a test does to PEFT's and transformers' registries is undone, and to the loaded modules and their cards."""
    mappings = [dict(mapping) for mapping in MAPPINGS]
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft_read"}
    yield
    for mapping, before in zip(MAPPINGS, mappings, strict=True):
        mapping.clear()
        mapping.update(before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_read"]:
        del sys.modules[name]
    sys.modules.update(modules)
    AutoConfig.register(TrimodalConfig.model_type, TrimodalConfig, exist_ok=True)
    AutoModel.register(TrimodalConfig, TrimodalModel, exist_ok=True)
    AutoModelForSequenceClassification.register(TrimodalConfig, TrimodalForSequenceClassification, exist_ok=True)
    AutoProcessor.register(TrimodalConfig, TrimodalProcessor, exist_ok=True)
    install_cards()


def test_read_is_a_real_member():
    """By value, by name, in iteration, as a string, as a key and through pickle and copy, like PEFT's own."""
    member = PeftType("READ")
    assert member is PeftType["READ"] is PeftType.READ
    assert list(PeftType).count(member) == 1
    assert isinstance(member, PeftType)
    assert (member.name, member.value, member) == ("READ", "READ", "READ")
    assert {"READ": 1}[member] == {member: 1}["READ"] == 1
    assert json.dumps({"type": member}) == '{"type": "READ"}'
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert (repr(member), str(member)) == (repr(PeftType.LORA).replace("LORA", "READ"), "PeftType.READ")
    assert member in PeftType
    with pytest.raises(ValueError, match="WRITE"):
        PeftType("WRITE")


def test_the_registry_knows_its_classes():
    """Configuration, tuner and prefix; transformers builds the prefix from the type's name."""
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.READ] is ReadConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["READ"] is ReadModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.READ] == ReadModel.prefix == PeftType.READ.value.lower() + "_"


def test_every_type_of_the_registry_still_works():
    """Adding a member leaves the others alone."""
    assert [PeftType(kind.value) for kind in PeftType] == list(PeftType)
    assert len({kind.name for kind in PeftType}) == len(PeftType.__members__)


@pytest.mark.parametrize("again", ["import", "reload", "purge"])
def test_importing_again_is_harmless(registry, again):
    """Reloading, as notebooks do, or importing after a purge registers the newest classes under the same member."""
    member, count = PeftType.READ, len(PeftType)
    if again == "purge":
        for name in [name for name in sys.modules if name.partition(".")[0] == "peft_read"]:
            del sys.modules[name]
        package = importlib.import_module("peft_read")
    else:
        package = importlib.reload(peft_read) if again == "reload" else importlib.import_module("peft_read")
    assert PeftType.READ is member
    assert len(PeftType) == count
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.READ] is package.ReadConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.READ] is package.ReadModel
    assert type(get_peft_config({"peft_type": "READ"})) is package.ReadConfig
    model = get_peft_model(base_model("bert"), package.ReadConfig(r=2))
    assert isinstance(model.base_model, package.ReadModel)


def test_a_read_of_peft_itself_is_not_replaced(registry):
    """Should PEFT ship a method of that name one day, importing says so in place of taking its name."""

    class TheirConfig(PeftConfig):
        pass

    TheirConfig.__module__ = "peft.tuners.read.config"
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.READ] = TheirConfig
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_read"]:
        del sys.modules[name]
    with pytest.raises(ImportError, match=rf"READ.*{peft.__version__}.*already.*peft\.tuners\.read\.config\.TheirCon"):
        importlib.import_module("peft_read")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.READ] is TheirConfig


def test_get_peft_config():
    """Defaults are enough, and fields go through."""
    assert get_peft_config({"peft_type": "READ"}) == ReadConfig()
    assert get_peft_config({"peft_type": "READ", "r": 3, "cell": "gru"}) == ReadConfig(r=3, cell="gru")


def test_config_is_written_and_read_unchanged(tmp_path):
    """Every field, through PEFT's loader by type and the class itself; read and written again, byte by byte."""
    FULL.save_pretrained(tmp_path / "one")
    for cls in (PeftConfig, ReadConfig):
        loaded = cls.from_pretrained(tmp_path / "one")
        assert type(loaded) is ReadConfig
        assert loaded == FULL
        loaded.save_pretrained(tmp_path / "two")
        one, two = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("one", "two"))
        assert one == two


def test_config_of_a_saved_model_is_read_unchanged(tmp_path):
    """Default targets are written as names, so that a later release's other defaults don't change a saved adapter."""
    model = adapted("bert", cell="gru")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
    assert written["peft_type"] == "READ"
    PeftModel.from_pretrained(base_model("bert"), tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == written


def test_config_pickles():
    """Processes of a data loader or a launcher are sent configurations."""
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert copy.deepcopy(FULL) == FULL


def test_config_file_does_not_depend_on_the_hash_seed(tmp_path):
    """Sets, whose order depends on it, are written as sorted lists, and fields by name: one file in every process."""
    config = ReadConfig(target_modules=[*"hgfedcba"], exclude_modules=[*"wvuts"])
    assert isinstance(config.target_modules, set)
    assert isinstance(config.exclude_modules, set)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == [*"abcdefgh"]
    assert written["exclude_modules"] == [*"stuvw"]
    assert list(written) == sorted(written)


LOAD = """
import sys
from peft import AutoPeftModel, PeftConfig, PeftModel
from torch import nn
from transformers import AutoModel
folder, base = sys.argv[1:]
for load in (
    lambda: PeftConfig.from_pretrained(folder),
    lambda: AutoPeftModel.from_pretrained(folder),
    lambda: PeftModel.from_pretrained(nn.Linear(1, 1), folder),
    lambda: AutoModel.from_pretrained(base).load_adapter(folder),
):
    try:
        load()
    except KeyError as error:
        print(repr(error))
import peft_read
print(PeftConfig.from_pretrained(folder).cell)
"""


def test_without_the_import_peft_does_not_know_it(tmp_path):
    """What the README explains: PEFT's bare `KeyError: 'READ'` from every loader, which `import peft_read` mends."""
    adapted("bert", cell="lstm").save_pretrained(tmp_path / "adapter")
    base_model("bert").save_pretrained(tmp_path / "base")
    command = [sys.executable, "-c", LOAD, tmp_path / "adapter", tmp_path / "base"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["KeyError('READ')"] * 4 + ["lstm"]
