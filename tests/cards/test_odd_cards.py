"""Odd and hostile cards in the folder, and odd things told for one: weights are saved whatever there is."""

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import adapted
from huggingface_hub import EvalResult, ModelCard
from peft import PeftModel

from peft_read import describe_adapter
from peft_read.cards.page import END, RECORD, Page


# 320 bytes that stand for more than a memory holds.
BOMB = "---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
UNREADABLE = {
    "aliases": BOMB + "---\nhello\n",
    "no YAML": "---\n[oops\n---\n# Mine\n",
    "a tag of Python": "---\na: !!python/object/apply:os.system ['true']\n---\n",
    "deep lists": "---\na: " + "[" * 40_000 + "\n---\n",
    "deep fields": "---\n" + "".join(" " * depth + "a:\n" for depth in range(200)) + "---\n",
    "long metadata": "---\na: '" + "x" * 60_000 + "'\n---\n",
    "a list": "---\n- a\n---\n",
    "a number for a name": "---\n1: a\n---\n",
    "a heading for a name": "---\n'## Use': a\n---\n",
    "a huge number": "---\na: " + "1" * 10_000 + "\n---\n",
    "long": "x" * 3_000_000,
}
READABLE = {
    "spaces": "---\na: 1\n---\n" + " " * 200_000,
    "empty lines": "---\na: 1\n---\n" + "\n" * 300_000 + "Mine.",
    "records without an end": "---\na: 1\n---\nMine.\n" + f"{RECORD}{{" * 20_000,
    "deep JSON in the record": f'---\na: 1\n---\nMine.\n{RECORD}{{"a":{"[" * 100_000}{"]" * 100_000}}}{END}\n',
    "a record of lists": f'---\na: 1\n---\nMine.\n{RECORD}{{"a": [1], "## Use": {{}}}}{END}\n',
    "sections of one name": "---\na: 1\n---\nMine.\n" + "## A\nx\n" * 3000,
    "names of arguments": "---\nself: 1\nignore_metadata_errors: 2\n---\nMine.\n",
}


def check_saved(folder):
    """The adapter is in its file."""
    PeftModel.from_pretrained(adapted("bert").unload(), folder)
    assert not list(folder.glob("_README*"))


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_card_stays_and_the_weights_are_saved(tmp_path, name):
    """In seconds, with a warning that names the file."""
    path = tmp_path / "README.md"
    path.write_text(UNREADABLE[name])
    begun = time.perf_counter()
    with pytest.warns(
        UserWarning, match=r"(?s)The adapter is saved, its card isn't.*README\.md can't be read.*Mend it"
    ):
        adapted("bert").save_pretrained(tmp_path)
    assert time.perf_counter() - begun < 20
    assert path.read_text() == UNREADABLE[name]
    check_saved(tmp_path)


@pytest.mark.parametrize("name", READABLE)
def test_an_odd_card_is_completed_and_keeps_what_is_a_person_s(tmp_path, name):
    path = tmp_path / "README.md"
    path.write_text(READABLE[name])
    begun = time.perf_counter()
    adapted("bert").save_pretrained(tmp_path)
    first = path.read_text()
    adapted("bert").save_pretrained(tmp_path)
    assert time.perf_counter() - begun < 20
    assert path.read_text() == first
    assert "## Use\n" in first
    assert "Mine." in first or name == "spaces"
    check_saved(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    tmp_path.joinpath("README.md").write_bytes(b"\xff\xfe\x00x" * 10)
    with pytest.warns(UserWarning, match=r"README\.md can't be read"):
        adapted("bert").save_pretrained(tmp_path)
    check_saved(tmp_path)


def test_links_folders_and_files_of_the_draft_s_name(tmp_path):
    """Nothing is written through a link, and no file that the user has is taken for ours."""
    precious = tmp_path / "precious.md"
    precious.write_text("Mine.")
    link, folder, own = (tmp_path / name for name in ("link", "folder", "own"))
    for each in (link, folder / "README.md", own):
        each.mkdir(parents=True)
    link.joinpath("README.md").symlink_to(precious)
    own.joinpath("_README.md").symlink_to(precious)
    for each, message in ((link, "it is a link to another file"), (folder, "it is no file")):
        with pytest.warns(UserWarning, match=message):
            adapted("bert").save_pretrained(each)
        assert each.joinpath("adapter_model.safetensors").is_file()
    adapted("bert").save_pretrained(own)
    assert link.joinpath("README.md").is_symlink()
    assert own.joinpath("_README.md").is_symlink()
    assert "## Use" in own.joinpath("README.md").read_text()
    assert precious.read_text() == "Mine."


def test_a_comment_that_is_opened_before_the_record_takes_no_text_away():
    text = f"---\na: 1\n---\n{RECORD}\n\nMine.\n\n{RECORD}{{}}{END}\n"
    assert "Mine." in str(Page.parse(text))


def result(**changes):
    fields = {"task_type": "t", "dataset_type": "d", "dataset_name": "D", "metric_type": "m", "metric_value": 1.0}
    return EvalResult(**fields | changes)


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"data": 3}, TypeError, "`data` must be a string, got int"),
        ({"data": "```\nopen"}, ValueError, "`data` has a code block that isn't closed.*end it by ```"),
        ({"data": "\ud800"}, ValueError, "`data` can't be written as UTF-8"),
        ({"data": "a\0b"}, ValueError, "`data` holds the control character"),
        ({"data": "x" * 600_000}, ValueError, "`data` must have at most 500,000 characters"),
        ({"data": f"{RECORD}{{}}{END}"}, ValueError, "leave that to the card"),
        ({"data": " "}, ValueError, "`data` is empty"),
        ({"training": [1]}, TypeError, "`training` must be a dict"),
        ({"training": {1: 2}}, TypeError, r"`training\[1\]` must be a string"),
        ({"training": {"a": "\ud800"}}, ValueError, r"`training\['a'\]` can't be written as UTF-8"),
        ({"results": "accuracy"}, TypeError, "`results` must be a list of .*EvalResult"),
        ({"results": [{"accuracy": 1.0}]}, TypeError, "has to hold huggingface_hub.EvalResult objects, got dict"),
        ({"results": [result(metric_value=float("nan"))]}, ValueError, "metric_value` must be finite, got nan"),
        ({"results": [result(metric_value=np.float32(1))]}, TypeError, "metric_value` must be .*got float32"),
        ({"results": [result(metric_value=None)]}, TypeError, "metric_value` must be a number"),
        ({"results": [result(dataset_name=None)]}, TypeError, "dataset_name` must be a string, got NoneType"),
        ({"results": [result(dataset_name="a\ud800")]}, ValueError, "dataset_name` can't be written as UTF-8"),
        ({"results": [result(metric_config={"a": {1}})]}, TypeError, "must be text, a number.*got set"),
        ({"tags": 5}, TypeError, "`tags` must be a string or a list of strings, got int"),
        ({"tags": {"a": 1}}, TypeError, "`tags` must be a string or a list of strings, got dict"),
        ({"tags": ["a", 3]}, TypeError, "`tags` must be a string, got int"),
        ({"tags": ["a\nb"]}, ValueError, "`tags` must be a single line"),
        ({"license": "mit\nlibrary_name: x"}, ValueError, "`license` must be a single line"),
        ({"license": "\udfff"}, ValueError, "`license` can't be written as UTF-8"),
        ({"model_name": "a\n## Use"}, ValueError, "`model_name` must be a single line"),
        ({"base_model": 7}, TypeError, "`base_model` must be a string or a list of strings"),
        ({"library_name": "x"}, ValueError, "`library_name` is always 'peft'"),
        ({"eval_results": []}, ValueError, "give `results`"),
        ({"model-index": []}, ValueError, "give `results`"),
        ({"## Use": "x"}, ValueError, "can't be the name of a field"),
        ({"widget": object()}, TypeError, "`widget` must be text, a number, or lists and dicts of such, got object"),
        ({"widget": [{"a": np.float64(1)}]}, TypeError, r"`widget\[0\]\['a'\]` must be text"),
        ({"widget": (1, 2)}, TypeError, "got tuple"),
        ({"co2": float("inf")}, ValueError, "`co2` must be finite"),
    ],
)
def test_what_no_card_can_hold_is_refused_when_it_is_told(tmp_path, told, error, message):
    """And what was told before stays told."""
    model = adapted("bert")
    describe_adapter(model, data="Rain.")
    with pytest.raises(error, match=message):
        describe_adapter(model, **told)
    model.save_pretrained(tmp_path)
    assert "Rain." in tmp_path.joinpath("README.md").read_text()


def test_what_a_card_can_hold_is_written(tmp_path):
    model = adapted("bert")
    fields = {"widget": [{"text": "a", "n": [1, 2.5, None, True]}], "date": datetime.date(2026, 1, 2), "co2": 0.5}
    training = {"steps": np.int64(3), "a|b\nc": object}
    describe_adapter(
        model, data="```\nx\n```", tags="rain", language=["en"], training=training, results=(result(),), **fields
    )
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert {name: data[name] for name in fields} == fields
    assert {"rain", "read"} <= set(data["tags"])


def test_many_threads_save_one_model(tmp_path):
    """Each into a folder of its own, weights and card."""
    model = adapted("bert")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: model.save_pretrained(tmp_path / str(number)), range(24)))
    for folder in tmp_path.iterdir():
        check_saved(folder)
        assert ModelCard.load(folder / "README.md").data.library_name == "peft"
