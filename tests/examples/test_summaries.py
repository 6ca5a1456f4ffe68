"""Summaries: ROUGE by hand, and whole runs of the example on a user's data and models."""

import json

import pytest
import summarise_video
import torch
from benchmark_files import write_how2
from common.annotations import ANNOTATIONS
from summarisation.ordered_captions import caption_tokenizer
from summarisation.rouge import exact_match, rouge
from test_examples import write_video
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTImageProcessorPil, ViTModel


def test_rouge_by_hand():
    """Unigrams, bigrams and the longest common subsequence, on tokens as blanks divide them; the mean over pairs."""
    scores = rouge(["a b , c", "x"], ["a c , B", "x"])
    assert scores["rouge1 (blanks)"] == pytest.approx(100 * (3 / 4 + 1) / 2)
    assert scores["rouge2 (blanks)"] == pytest.approx(0)
    assert scores["rougeL (blanks)"] == pytest.approx(100 * (1 / 2 + 1) / 2)


def test_the_tokeniser_is_part_of_the_name_and_matters():
    """The package's own drops punctuation, splits at hyphens and ignores case; with its stemmer endings as well."""
    pair = (["well-tuned guitars ."], ["Well tuned guitar"])
    assert rouge(*pair, "blanks")["rouge1 (blanks)"] == 0
    assert rouge(*pair, "rouge-score")["rouge1 (rouge-score)"] == pytest.approx(100 * 2 / 3)
    assert rouge(*pair, "rouge-score, stemmer")["rouge1 (rouge-score, stemmer)"] == pytest.approx(100)
    with pytest.raises(ValueError, match="`tokenizer` must be one of 'blanks', 'rouge-score'"):
        rouge(*pair, "mine")
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        rouge(["a"], ["a", "b"])
    assert exact_match(["a b ", "c"], ["a b", "d"]) == 50


@pytest.fixture
def tiny_t5(tmp_path):
    folder = tmp_path / "t5"
    torch.manual_seed(0)
    tokenizer = caption_tokenizer()
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_vision(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    ViTModel(config).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


def write_videos(folder, change=None):
    folder.mkdir()
    lines = []
    for number, split in enumerate(("train", "train", "validation", "test")):
        write_video(folder / f"{number}.mp4", seconds=3 + number % 2)
        line = {"video": f"{number}.mp4", "query": " ", "summary": "first a one", "split": split}
        lines.append(json.dumps(line | ((change or {}) if number == 1 else {})))
    (folder / ANNOTATIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["summarise_video.py", *map(str, arguments)])
    summarise_video.main()


def test_a_users_own_videos_and_model(tmp_path, monkeypatch, capsys, tiny_t5, tiny_vision):
    """Videos with summaries in, scores and adapter with its card out; the script loads it in a new process."""
    monkeypatch.setenv("PYTHONPATH", str(summarise_video.Path(summarise_video.__file__).parents[1]), prepend=":")
    data, output = write_videos(tmp_path / "data"), tmp_path / "out"
    models = ["--model", tiny_t5, "--frame-encoder", tiny_vision]
    run(monkeypatch, "--data", data, *models, "--output", output, "--steps", 2)
    assert "Loaded again in a new process" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["read"]["test"].keys() >= {"rouge1 (blanks)", "exact match"}
    assert "| data | test | rougeL (blanks) |" in (output / "adapter" / "README.md").read_text(encoding="utf-8")


def test_how2_like_data(tmp_path, monkeypatch, capsys, tiny_t5):
    """Text of tokens and features, the projection alone, another tokeniser of ROUGE."""
    (tmp_path / "data").mkdir()
    data, output = write_how2(tmp_path / "data"), tmp_path / "out"
    options = ["--steps", 1, "--method", "head", "--tokenizer", "rouge-score"]
    run(monkeypatch, "--data", data, "--model", tiny_t5, "--output", output, *options)
    assert "rouge1 (rouge-score)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mine"], "--data and --model go together"),
        (["--data", "videos", "--model", "t5"], "holds videos: name a --frame-encoder"),
        (["--steps", "0"], "--steps and --clip-seconds must be positive"),
        (["--output", "mine"], "wasn't written by this script"),
    ],
)
def test_mistakes_on_the_command_line_are_told_at_once(tmp_path, monkeypatch, capsys, arguments, message):
    """Before anything is made."""
    monkeypatch.chdir(tmp_path)
    write_videos(tmp_path / "videos")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--cache", "cache", *arguments)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "cache").exists()


def test_a_line_without_a_summary_is_named(tmp_path, monkeypatch, tiny_t5, tiny_vision):
    """Which line, and what is missing."""
    data = write_videos(tmp_path / "data", {"summary": ""})
    with pytest.raises(ValueError, match=r"annotations\.jsonl:2: field 'summary' is missing"):
        run(
            monkeypatch, "--data", data, "--model", tiny_t5, "--frame-encoder", tiny_vision, "--output", tmp_path / "o"
        )
