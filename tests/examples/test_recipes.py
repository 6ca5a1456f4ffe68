"""Recipes: each runs end to end on random features of the right shapes; mistakes are named."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import run_recipe
import torch
from benchmark_files import write_charades, write_how2, write_qvhighlights, write_tvsum, write_youtube
from common.recipes import METHODS, read_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration, BertTokenizer


RECIPES = Path(run_recipe.__file__).parent / "recipes"
SCORES = {
    "qvhighlights": {"MR-full-mAP", "MR-full-R1@0.5", "HL-min-VeryGood-mAP", "HL-min-VeryGood-Hit1"},
    "youtube_highlights": {"mAP"},
    "tvsum": {"mAP@5"},
    "charades_sta": {"Rank1@0.5", "Rank5@0.7"},
    "how2": {"rouge1 (blanks)", "rougeL (rouge-score)"},
}


@pytest.fixture
def tiny_bart(tmp_path):
    """An encoder-decoder with its tokeniser in a folder, in place of BART-base."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "to", "tune", "a", "guitar", "bake", "bread", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    folder = tmp_path / "bart"
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), eos_token="[SEP]", bos_token="[CLS]")
    tokenizer.save_pretrained(folder)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "forced_eos_token_id": 3}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=len(words), d_model=16, max_position_embeddings=80, **sizes, **heads, **special)
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write(benchmark, folder):
    folder.mkdir()
    if benchmark == "charades_sta":
        return write_charades(folder, ["AAAAA 0.0 1.0##a person opens a door.", "AAAAA 1.0 3.0##a person"] * 2)
    writers = {"qvhighlights": write_qvhighlights, "youtube_highlights": write_youtube, "how2": write_how2}
    return writers.get(benchmark, write_tvsum)(folder)


def run(benchmark, data, output, *options):
    arguments = [RECIPES / f"{benchmark}.yaml", "--data", data, "--output", output, "--epochs", 1, *options]
    return run_recipe.main([str(argument) for argument in arguments])


def test_every_recipe_is_tried():
    """Those in the folder are those that are run below."""
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SCORES)


@pytest.mark.parametrize("benchmark", SCORES)
def test_a_recipe_runs_from_features_to_scores(tmp_path, tiny_bart, benchmark):
    """Files in, scores in per cent, adapter and results out."""
    options = {
        "youtube_highlights": ["--domains", "dog", "surfing"],
        "tvsum": ["--domains", "VT"],
        "how2": ["--model", tiny_bart],
    }
    data, output = write(benchmark, tmp_path / "data"), tmp_path / "out"
    results = run(benchmark, data, output, *options.get(benchmark, []))
    written = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert written["machine"]["versions"]["torch"] == version("torch")
    for domain, scores in results["scores"].items():
        assert set(scores) >= SCORES[benchmark]
        assert all(0 <= score <= 100 or np.isnan(score) for score in scores.values())
        saved = load_file(output / domain / "adapter" / "adapter_model.safetensors")
        assert any("weight_hh_l0" in name for name in saved)
    if benchmark == "youtube_highlights":
        values = [scores["mAP"] for scores in results["scores"].values()]
        assert results["average"]["mAP"] == pytest.approx(np.mean(values))
    if benchmark == "qvhighlights":
        lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["qid"] for line in lines] == [11, 12]


def test_a_base_of_one_run_is_adapted_by_the_next(tmp_path):
    """The base's own weights stay as they are; the adapter of a few samples loads onto it."""
    data = write("qvhighlights", tmp_path / "data")
    run("qvhighlights", data, tmp_path / "full", "--method", "full")
    base = tmp_path / "full" / "model"
    before = load_file(base / "model.safetensors")
    run("qvhighlights", data, tmp_path / "read", "--base", base, "--videos", 2)
    assert all(torch.equal(before[name], weight) for name, weight in load_file(base / "model.safetensors").items())
    saved = load_file(tmp_path / "read" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in saved} == {"encoder", "decoder", "saliency_head", "span_head", "score_head"}
    model = run_recipe.MomentModel.from_pretrained(base)
    assert PeftModel.from_pretrained(model, tmp_path / "read" / "adapter")
    run("qvhighlights", data, tmp_path / "head", "--base", base, "--method", "head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, "unknown 'batch'; a recipe has"),
        ({"epochs": None}, "`epochs` and `accumulation` must be positive numbers"),
        ({"learning_rate": {"read": 0.1}}, "`learning_rate` must have one of each of"),
        ({"learning_rate": dict.fromkeys(METHODS, "1e-2")}, "must be positive numbers"),
        ({"benchmark": "qvhighlight"}, "unknown benchmark 'qvhighlight'"),
        ({"adapter": {"r": 0}}, "`r` must be"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, change, message):
    """Which entry, and what it must be."""
    recipe = read_recipe(RECIPES / "youtube_highlights.yaml").__dict__ | {"domains": ["dog"]} | change
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    data = write("youtube_highlights", tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run_recipe.main([str(tmp_path / "mine.yaml"), "--data", str(data), "--output", str(tmp_path / "out")])


def test_mistakes_on_the_command_line(tmp_path):
    """More samples than there are, a domain that the recipe doesn't have."""
    data = write("youtube_highlights", tmp_path / "data")
    with pytest.raises(ValueError, match="--videos 3: there are 2 training samples"):
        run("youtube_highlights", data, tmp_path / "out", "--domains", "dog", "--videos", 3)
    with pytest.raises(ValueError, match=r"--domains cat: the recipe has \['dog'"):
        run("youtube_highlights", data, tmp_path / "out", "--domains", "cat")
