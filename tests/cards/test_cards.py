"""Cards in folders: what they say, that what a person writes into them stays, and that other methods keep theirs."""

import dataclasses
import inspect
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import adapted
from huggingface_hub import EvalResult, ModelCard
from lstta_models import composite
from models import base_model, bert_config, classifier
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertModel, Trainer
from trimodal_families import tower

from peft_read import LsttaConfig, ReadConfig, TrimodalForSequenceClassification, describe_adapter
from peft_read.cards import overrides
from peft_read.cards.content import templates
from peft_read.cards.page import Page


ROOT = Path(__file__).parents[2]
RESULT = EvalResult("text-classification", "ann/rain", "Rain", "accuracy", 0.875)


def saved(folder, model=None, **told):
    """The folder's card after a model was saved there."""
    model = adapted("bert") if model is None else model
    if told:
        describe_adapter(model, **told)
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


def trimodal(**options):
    towers = {"vision": tower("vit"), "text": tower("bert")}
    return TrimodalForSequenceClassification.from_pretrained_towers(**towers, **options)


def test_a_card_says_what_there_is(tmp_path):
    """Method, base, numbers of the saved file, results and versions, with metadata that the Hub's own class reads."""
    model = get_peft_model(classifier(), ReadConfig(r=4, cell="gru", modules_to_save=["classifier"]))
    model.get_base_model().name_or_path = model.config.name_or_path = "ann/base"
    text = saved(tmp_path / "rain", model, data="Words about rain.", results=[RESULT], training={"steps": 7})
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "ann/base"
    assert card.data.tags == ["base_model:adapter:ann/base", "read", "transformers"]
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.eval_results == [dataclasses.replace(RESULT)]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    head = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" in name)
    kib = (tmp_path / "rain" / "adapter_model.safetensors").stat().st_size / 1024
    for part in (
        "# rain\n",
        "arxiv.org/abs/2312.06950",
        f"| {trained:,} (",
        f"of them {head:,} in `classifier`",
        f"| {kib:,.0f} KiB |",
        "`r=4`, `cell='gru'`",
        "Words about rain.",
        "| Rain |  | accuracy | 0.875 |",
        "| steps | 7 |",
        f"| torch | {version('torch')} |",
        "CPU",
        'BertForSequenceClassification.from_pretrained("ann/base", num_labels=3)',
        'PeftModel.from_pretrained(base_model, "rain")',
        "KeyError: 'READ'",
    ):
        assert part in card.text, part


def test_every_adapter_is_on_the_card(tmp_path):
    """Several adapters lie in subfolders, and those alone that were saved are told of."""
    model = adapted("bert")
    model.add_adapter("other", ReadConfig(r=2))
    text = saved(tmp_path / "two", model)
    assert "| `default` |" in text
    assert "| `other` |" in text
    assert 'model.load_adapter("two", subfolder="other", adapter_name="other")' in text
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    text = (tmp_path / "one" / "README.md").read_text()
    assert "| `default` |" not in text
    assert 'PeftModel.from_pretrained(base_model, "one", subfolder="other", adapter_name="other")' in text


def test_a_local_base_is_no_hub_id(tmp_path, monkeypatch):
    """A path never gets into the metadata or the text, absolute or relative; the folder's name does."""
    base_model("bert").save_pretrained(tmp_path / "secret" / "base")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "secret" / "base", "secret/base", "./secret/base"):
        model = get_peft_model(BertModel.from_pretrained(path), ReadConfig(r=2))
        text = saved(tmp_path / "adapter", model)
        assert "secret" not in text
        assert "from a local folder, `base`" in text
        card = ModelCard(text)
        assert card.data.base_model is None
        assert card.data.tags == ["read", "transformers"]
        assert card.data.pipeline_tag == "feature-extraction"
    text = saved(tmp_path / "named", model, base_model="ann/base", model_name="Rain")  # somebody knows better
    assert "# Rain\n" in text
    assert 'BertModel.from_pretrained("ann/base")' in text
    assert "base_model:adapter:ann/base" in ModelCard(text).data.tags
    assert ModelCard(text).data.base_model == "ann/base"


def test_a_base_of_ones_own(tmp_path):
    """A class that isn't transformers' is imported from where it is; what has no `from_pretrained` is named."""
    own = type("OwnBert", (BertModel,), {"__module__": "rain.modeling"})
    text = saved(tmp_path / "own", get_peft_model(own(bert_config()), ReadConfig(r=2)))
    assert "from rain.modeling import OwnBert  # the base model's own code" in text
    made = get_peft_model(own(bert_config()), ReadConfig(r=2))
    made.get_base_model().name_or_path = "ann/text-model"
    text = saved(tmp_path / "made", made)
    assert "base_model = ...  # the OwnBert made of ann/text-model, built as it was for training" in text
    net = nn.Sequential(nn.Linear(4, 4))
    text = saved(tmp_path / "net", get_peft_model(net, ReadConfig(target_modules=["0"], r=2)))
    assert "base_model = ...  # the Sequential, built as it was for training" in text


def test_a_composite_is_made_of_its_towers(tmp_path):
    """The code joins towers by their names; what starts at random and isn't saved is told of."""
    base = trimodal(num_labels=5, projection_dim=8)
    base.vision_model.name_or_path, base.text_model.name_or_path = "ann/vit", ""
    text = saved(tmp_path / "whole", get_peft_model(base, LsttaConfig(r=8, modules_to_save=["fusion", "classifier"])))
    code = 'peft_read.TrimodalForSequenceClassification.from_pretrained_towers(\n    vision="ann/vit",\n'
    assert code + '    text="path/to/text-tower",\n    num_labels=5,\n    projection_dim=8,\n)' in text
    assert "started at random" not in text
    card = ModelCard(text)
    assert (card.data.base_model, card.data.pipeline_tag) == ("ann/vit", "video-classification")
    assert card.data.tags == ["base_model:adapter:ann/vit", "lstta", "transformers"]
    text = saved(tmp_path / "part", get_peft_model(trimodal(), LsttaConfig(r=8, modules_to_save=["classifier"])))
    assert "base model's `fusion` started at random and aren't in this adapter" in text
    base = trimodal()
    base.save_pretrained(tmp_path / "base")
    base = TrimodalForSequenceClassification.from_pretrained(tmp_path / "base")
    text = saved(tmp_path / "loaded", get_peft_model(base, LsttaConfig(r=8)))
    assert 'peft_read.TrimodalForSequenceClassification.from_pretrained("path/to/base-model")' in text
    assert "base_model = ..." in saved(tmp_path / "own", get_peft_model(composite(), LsttaConfig(r=8)))


def test_the_cards_code_loads_the_adapter(tmp_path):
    """Written to be run from the folder beside the adapter, with the base's path put in."""
    base_model("bert").save_pretrained(tmp_path / "base")
    model = get_peft_model(BertModel.from_pretrained(tmp_path / "base"), ReadConfig(r=2, init_weights=False))
    text = saved(tmp_path / "mine", model)
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/base-model", "base")
    code += "import torch\nprint(model(input_ids=torch.arange(3, 9)[None]).last_hidden_state.abs().sum().item())"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.arange(3, 9)[None]).last_hidden_state.abs().sum().item()
    assert float(printed) == pytest.approx(expected, rel=1e-5)


EDITS = {
    "a field": ("library_name: peft\n", "library_name: peft\nlicense: mit\nlanguage: [en]  # and some German\n"),
    "a tag": ("tags:\n", "tags:\n- weather\n"),
    "a sentence": ("Words about rain.", "Words about snow."),
    "a title": ("# mine\n", "# Rain\n\nby Ann\n"),
    "a section": ("## Limits\n", "## My notes\n\n```python\n## no heading\n```\n\n## Limits\n"),
    "the end": ("2312.06950).\n", "2312.06950).\n\n## Thanks\n\n## Thanks\n\nTo two.\n"),
    "a section less": ("## Training\n\nNot recorded.\n\n", ""),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_stays_as_it_is_and_the_rest_is_renewed(tmp_path, edit):
    """Through later saves, also of a model that knows less, while an untouched part follows the model."""
    old, new = EDITS[edit]
    path = tmp_path / "mine" / "README.md"
    text = saved(tmp_path / "mine", data="Words about rain.")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    for _ in range(2):
        model = adapted("bert", r=8)
        model.save_pretrained(tmp_path / "mine")
        text = path.read_text()
        assert new in text
        assert old not in text.replace(new, "")
        assert "`r=8`" in text
        assert "`r=4`" not in text
        assert "Words about" in text  # which the new model doesn't know
        assert text.count("\n## Limits\n") == 1


def test_the_library_is_ours_to_say(tmp_path):
    """The Hub loads the files by it: an edit of this one field doesn't stay."""
    text = saved(tmp_path)
    tmp_path.joinpath("README.md").write_text(text.replace("library_name: peft", "library_name: transformers"))
    assert saved(tmp_path) == text


def test_peft_s_own_hook_writes_the_card(tmp_path):
    """Where PEFT's users call it themselves, before anything is saved."""
    adapted("bert").create_or_update_model_card(tmp_path)
    assert "| unknown | unknown |" in (tmp_path / "README.md").read_text()


def test_saving_again_changes_nothing(tmp_path):
    assert saved(tmp_path, results=[RESULT]) == saved(tmp_path, results=[RESULT])


def test_a_card_of_ones_own_is_kept_and_completed(tmp_path):
    """A README that was there before keeps every line, and gets the sections that it lacks."""
    own = "---\nlicense: mit  # really\ntags: [weather]\n---\n# Rain\r\n\r\nAbout.\n\n## Use\n\nDon't.\n"
    tmp_path.joinpath("README.md").write_text(own)
    text = saved(tmp_path)
    for line in ("# Rain", "About.", "Don't.", "## Limits"):
        assert line in text
    assert "PeftModel.from_pretrained" not in text
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert set(card.data.tags) == {"weather", "read", "transformers"}
    assert card.data.library_name == "peft"
    assert text == saved(tmp_path)


def test_metadata_keep_their_comments(tmp_path):
    """As long as no field changes, they are written as they were read."""
    text = saved(tmp_path).replace("library_name: peft", "library_name: peft  # what else\nlicense: mit")
    tmp_path.joinpath("README.md").write_text(text)
    assert "library_name: peft  # what else\nlicense: mit" in saved(tmp_path)


def test_a_loaded_adapter_keeps_what_its_trainer_wrote(tmp_path):
    """Saved again by somebody who only loaded it: hardware, data and results stay those of the training."""
    text = saved(tmp_path / "mine", data="Rain.").replace("CPU, ", "H200, ")
    mark = Page.parse(text)
    mark.record["## Versions"] = Page().renewed(Page.parse(text)).record["## Versions"]  # as if generated there
    tmp_path.joinpath("mine", "README.md").write_text(str(mark))
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "mine")
    text = saved(tmp_path / "mine", loaded)
    assert "H200, " in text
    assert "Rain." in text


def test_what_describes_no_adapter_is_refused():
    with pytest.raises(TypeError, match="PeftModel with adapters of READ or LSTTA, got BertModel"):
        describe_adapter(base_model("bert"), data="Rain.")
    with pytest.raises(TypeError, match=r"has to hold huggingface_hub\.EvalResult objects, got dict"):
        describe_adapter(adapted("bert"), results=[{"accuracy": 1.0}])


def test_lora_cards_are_upstream_byte_for_byte(tmp_path):
    """A LoRA model goes through PEFT's own function, whatever README is there."""
    assert PeftModel.create_or_update_model_card is not upstream("create_or_update_model_card")
    for folder, write in ((tmp_path / "a", None), (tmp_path / "b", upstream("save_pretrained"))):
        model = get_peft_model(base_model("bert"), LoraConfig(r=2, target_modules=["query"]))
        folder.mkdir()
        folder.joinpath("README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        if write is None:
            model.save_pretrained(folder)
        else:
            write(model, folder)
            folder.joinpath("README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
            upstream("create_or_update_model_card")(model, folder)
    assert tmp_path.joinpath("a", "README.md").read_bytes() == tmp_path.joinpath("b", "README.md").read_bytes()


def upstream(name, owner=PeftModel):
    return getattr(getattr(owner, name), overrides.OURS)


def test_no_other_method_stands_beside_ours():
    """What the guard relies on: all adapters of a PeftModel are of one method."""
    with pytest.raises(ValueError, match="different peft types"):
        adapted("bert").add_adapter("another", LoraConfig(target_modules=["query"]))


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (PeftModel, "save_pretrained", {"save_directory", "is_main_process"}),
        (PeftModel, "create_or_update_model_card", {"output_dir"}),
        (PeftModel, "_upload_modified_files", {"working_dir", "repo_id", "token", "revision"}),
        (Trainer, "push_to_hub", {"token", "revision"}),
        (Trainer, "create_model_card", {"tags", "tasks", "model_name", "finetuned_from"}),
        (Trainer, "_push_from_checkpoint", set()),
    ],
)
def test_upstream_has_what_is_overridden(owner, name, parameters):
    """Where PEFT or transformers change, this says so before a card is lost."""
    original = upstream(name, owner)
    assert original.__module__.partition(".")[0] in ("peft", "transformers")
    assert parameters <= inspect.signature(original).parameters.keys()
    assert inspect.signature(getattr(owner, name)) == inspect.signature(original)


def test_installing_again_overrides_once():
    before = upstream("save_pretrained")
    overrides.install()
    assert upstream("save_pretrained") is before
    assert not hasattr(before, overrides.OURS)


def test_a_missing_place_is_an_import_error():
    with pytest.raises(ImportError, match=r"PeftModel\.gone, which this version of PEFT"):
        overrides._override(PeftModel, "gone", lambda *_: None)


def test_both_templates_are_there():
    assert {path.name for path in templates().glob("*.md")} >= {"read.md", "lstta.md"}


def test_a_wheel_brings_the_templates(tmp_path):
    """Built, unpacked elsewhere, and run from there."""
    builders = pytest.importorskip("hatchling.builders.wheel", reason="the build backend isn't installed")
    wheel = next(builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from peft_read.cards.content import templates as t; print(t(), *sorted(p.name for p in t().glob('*.md')))"
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "site")}}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, **elsewhere, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert printed.split() == [str(tmp_path / "site" / "peft_read" / "hub_cards"), "lstta.md", "read.md"]


def test_the_example_cards_are_ours():
    """As the examples wrote them: metadata that the Hub's own class reads, results among them, and no local path."""
    for name, tag in (("finetune_video", "read"), ("trimodal_question_answering", "lstta")):
        text = (ROOT / "hub_cards" / "examples" / f"{name}.md").read_text(encoding="utf-8")
        card = ModelCard(text)
        assert card.data.library_name == "peft"
        assert tag in card.data.tags
        assert card.data.eval_results
        assert "Not recorded" not in text
        assert "/tmp" not in text
        assert str(Path.home()) not in text
        assert not Page.parse(text).changed
