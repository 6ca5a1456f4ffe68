"""The study of PVLA with pairs: what it plans, what it chooses, where it goes on, what it prints."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from alignment_study.results import Results, chosen_options, table
from alignment_study.rows import ALONE, CELLS, CONTRASTIVE, OPTIONS, PAPER, ROWS, SEEDS, TUNING_SEEDS, Row, Run
from common.embedded import WORDS, text_encoder_path
from transformers import AutoTokenizer
from video_grounding.features import counting_only, tokenize


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
OTHERS = "contrastive .5, 400 pairs, captions of other videos"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import pvla_pairs

    return pvla_pairs


def tuned(path, *entries):
    """Results of tuning: a row, a seed, weight, rate and the mAP on validation."""
    results = Results(path)
    for row, seed, weight, rate, score in entries:
        results.add(Run("plain", 25, row, seed, weight, rate, 200), {"validation mAP": score, "CPU seconds": 10.0})
    return results


def arguments_of(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pvla_pairs.py", *arguments])
    return script.parse_arguments()


def test_weight_and_rate_are_what_did_best_on_validation(tmp_path):
    """By the mean over the seeds of those tried on the most of them; a control has those of what it controls."""
    path = tmp_path / "results.json"
    assert chosen_options(Results(path), CONTRASTIVE) == (3.0, 3e-3)
    tried = [(CONTRASTIVE, 900, 3.0, 3e-3, 70), (CONTRASTIVE, 901, 3.0, 3e-3, 60)]
    tried += [(CONTRASTIVE, 900, 10.0, 3e-3, 66), (CONTRASTIVE, 901, 10.0, 3e-3, 65)]
    tried += [(CONTRASTIVE, 900, 1.0, 3e-3, 99), (PAPER, 900, 1.0, 1e-2, 50)]  # the one of 99 has one seed only
    results = tuned(path, *tried)
    assert chosen_options(results, CONTRASTIVE) == chosen_options(results, OTHERS) == (10.0, 3e-3)
    assert chosen_options(results, PAPER) == (1.0, 1e-2)


def test_what_is_planned(script, monkeypatch, tmp_path):
    """All that the pages speak of, once, what tells most first; of READ alone only the rate is tuned."""
    results = tuned(tmp_path / "results.json", (CONTRASTIVE, 900, 10.0, 3e-3, 99))
    args = arguments_of(script, monkeypatch)
    runs = list(script.planned(args, results))
    assert len(runs) == len(set(runs))
    of_cell = {cell: [run for run in runs if (run.task, run.labels) == cell] for cell in CELLS}
    assert {run.row for run in of_cell["plain", 25]} == {run.row for run in of_cell["second", 100]} == set(ROWS)
    for cell, rows in CELLS.items():
        assert len(of_cell[cell]) == sum(row.seeds for row in list(ROWS.values())[:rows])
    assert [(run.task, run.labels, run.row) for run in runs[:2]] == [("plain", 25, ALONE), ("plain", 25, CONTRASTIVE)]
    assert {run.weight for run in runs if run.row in (CONTRASTIVE, OTHERS)} == {10.0}
    assert {(run.weight, run.rate) for run in runs if "not chosen" in run.row} == {OPTIONS[0]}
    assert {run.steps for run in runs} == {200, 400, 600, 1200}
    tuning = list(script.tuning(args))
    assert sum(run.row == ALONE for run in tuning) == 2 * 3
    assert {run.row for run in tuning} == {name for name, row in ROWS.items() if row.like is None}
    assert {run.seed for run in tuning} == set(TUNING_SEEDS)
    assert not set(TUNING_SEEDS) & set(SEEDS)
    args = arguments_of(script, monkeypatch, "--rows", "captions of other", "--cells", "second-10", "--seeds", "203")
    assert [(run.row, run.seed) for run in script.planned(args, results)] == [(OTHERS, 203)]
    assert CONTRASTIVE in {run.row for run in script.tuning(args)}


def test_it_goes_on_where_it_was_cut(script, monkeypatch, tmp_path, capsys):
    """What is in the file isn't run again, weights come first; the table pairs differences by seed."""
    path = tmp_path / "results.json"
    options = [(CONTRASTIVE, seed, *option, 50) for seed in TUNING_SEEDS for option in OPTIONS]
    options += [(ALONE, *entry[1:]) for entry in options if entry[2] == OPTIONS[0][0]]
    before = len(tuned(path, *options[1:]).entries)
    scores = {(ALONE, 200): 60.0, (CONTRASTIVE, 200): 70.0, (ALONE, 201): 50.0, (CONTRASTIVE, 201): 64.0}
    done = []

    def do(run, row, materials):
        if not done:
            assert run == Run("plain", 25, CONTRASTIVE, 900, *OPTIONS[0], 200)
        if run.seed in TUNING_SEEDS:
            done.append(run)
            return {"validation mAP": 60.0, "CPU seconds": 1.0}
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(run)
        return {"test mAP": scores[run.row, run.seed], "mAP of matching by cosine": 90.0, "CPU seconds": 1.0}

    monkeypatch.setattr(script, "do", do)
    monkeypatch.setattr(script, "make_materials", lambda cache: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = ["--results", str(path), "--cells", "plain-25", "--seeds", "200", "201"]
    arguments += ["--rows", "^READ alone$|^contrastive .5, 400 pairs$"]
    monkeypatch.setattr(sys, "argv", ["pvla_pairs.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    kept = json.loads(path.read_text(encoding="utf-8"))[before:]
    assert all(asdict(run).items() <= entry.items() for run, entry in zip(done, kept, strict=True))
    del done[1:]
    script.main()
    assert [(run.row, run.seed) for run in done[1:]] == [(CONTRASTIVE, 201)]
    row = "| +12.0 ± 2.8 | +10.0, +14.0 | 90.0 ± 0.0 |"
    assert row in capsys.readouterr().out
    assert row in table(Results(path), "plain", 25)


def test_captions_of_other_videos(script):
    """Each video is there once, and so is each caption, and none with its own."""
    words = [{"frame_features": torch.tensor(i), "input_ids": i, "word_mask": i} for i in range(30)]
    materials = script.Materials(Path(), None, {}, words, [f"a {i}" for i in range(30)])
    run = Run("plain", 25, OTHERS, 7, 3.0, 3e-3, 200)
    pairs = script.chosen_pairs(run, Row(pairs=20, others=True), materials)
    videos, captions = ([int(pair[name]) for pair in pairs] for name in ("frame_features", "input_ids"))
    assert len(set(videos)) == 20
    assert set(captions) == set(videos)
    assert all(video != caption for video, caption in zip(videos, captions, strict=True))


def test_digit_words_alone():
    """Of a query only the digit's name counts."""
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_path())
    query = tokenize(tokenizer, "the second five")
    assert query["word_mask"] == [0, 1, 1, 1, 0]
    assert counting_only(query, WORDS, tokenizer) == query | {"word_mask": [0, 0, 0, 1, 0]}
