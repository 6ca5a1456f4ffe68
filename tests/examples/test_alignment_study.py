"""The study of PVLA with pairs: what it plans, what it chooses, where it goes on, what it prints."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from alignment_study.results import Results, chosen_options, print_table
from alignment_study.rows import ALONE, CELLS, CONTRASTIVE, MORE_ROWS, PAPER, ROWS, SEEDS, Row, Run


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


def plan(script, monkeypatch, results, *arguments):
    monkeypatch.setattr(sys, "argv", ["pvla_pairs.py", *arguments])
    return list(script.planned(script.parse_arguments(), results))


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
    runs = plan(script, monkeypatch, results)
    assert len(runs) == len(set(runs)) == len(SEEDS) * sum(CELLS.values()) == 160
    assert [(run.task, run.labels, run.row) for run in runs[:2]] == [("plain", 25, ALONE), ("plain", 25, CONTRASTIVE)]
    assert {run.weight for run in runs if run.row in (CONTRASTIVE, OTHERS)} == {10.0}
    assert {run.steps for run in runs} == {200, 400, 600}
    assert len(set(plan(script, monkeypatch, results, "--everything"))) == len(SEEDS) * len(ROWS | MORE_ROWS) * 8
    tuning = plan(script, monkeypatch, results, "--tune")
    assert sum(run.row == ALONE for run in tuning) == 2 * 3
    assert not any(run.row == OTHERS for run in tuning)
    assert not {run.seed for run in tuning} & set(SEEDS)
    assert {run.row for run in plan(script, monkeypatch, results, "--rows", "InfoNCE", "--cells", "second-10")} == {
        name for name in ROWS | MORE_ROWS if "InfoNCE" in name
    }


def test_it_goes_on_where_it_was_cut(script, monkeypatch, tmp_path, capsys):
    """What is in the file isn't run again; the table pairs differences by seed."""
    path = tmp_path / "results.json"
    scores = {(ALONE, 200): 60.0, (CONTRASTIVE, 200): 70.0, (ALONE, 201): 50.0, (CONTRASTIVE, 201): 64.0}
    done = []

    def do(run, row, materials):
        if len(done) == 3:
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
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert all(asdict(run).items() <= entry.items() for run, entry in zip(done, kept, strict=True))
    done.clear()
    script.main()
    assert [(run.row, run.seed) for run in done] == [(CONTRASTIVE, 201)]
    print_table(Results(path))
    assert "| +12.0 ± 2.8 | +10.0, +14.0 | 90.0 ± 0.0 |" in capsys.readouterr().out


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
