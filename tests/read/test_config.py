"""Every field of the configuration is checked when it is set."""

import pytest
from peft import PeftType

from peft_read import ReadConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer, got 0"),
        ({"r": -3}, "`r` must be a positive integer, got -3"),
        ({"r": 2.5}, "`r` must be a positive integer, got 2.5"),
        ({"r": True}, "`r` must be a positive integer, got True"),
        ({"rank_pattern": {"fc2": 0}}, r"`rank_pattern\['fc2'\]` must be a positive integer"),
        ({"cell": "mamba"}, "`cell` must be one of 'rnn', 'gru', 'lstm', 'none', got 'mamba'"),
        ({"cell": None}, "`cell` must be one of"),
        ({"recur_over": "time"}, "`recur_over` must be one of 'sequence', 'frames', got 'time'"),
        ({"bidirectional": "yes"}, "`bidirectional` must be True or False"),
        ({"init_weights": 1}, "`init_weights` must be True or False"),
        ({"act_fn": "snake"}, "`act_fn` must be one of .*'gelu'.*, got 'snake'"),
        ({"act_fn": "prelu"}, "`act_fn` must have no weights of its own; 'prelu' has"),
        ({"dropout": 1.0}, "`dropout` must be a number from 0 to below 1, got 1.0"),
        ({"dropout": "0.1"}, "`dropout` must be a number"),
        ({"scaling": float("nan")}, "`scaling` must be a finite number"),
        ({"cell": "none", "bidirectional": True}, "`cell='none'` has no recurrence"),
        ({"cell": "none", "recur_over": "frames", "num_frames": 4}, "`cell='none'` has no recurrence"),
        ({"recur_over": "frames", "num_frames": 0}, "`num_frames` must be a positive integer"),
        ({"num_frames": 4}, "`num_frames` is for `recur_over='frames'` only"),
        ({"layers_pattern": "layers"}, "`layers_pattern` says what `layers_to_transform` indexes"),
        (
            {"layers_to_transform": [0], "target_modules": ".*fc2"},
            "doesn't go with a `target_modules` that is a string",
        ),
        ({"task_type": "SEGMENTATION"}, "Invalid task type"),
    ],
)
def test_invalid_values_are_refused(fields, message):
    """At construction, with what came and what is allowed."""
    with pytest.raises(ValueError, match=message):
        ReadConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 4, "cell": "gru", "bidirectional": True, "act_fn": "silu", "dropout": 0.5, "scaling": -2},
        {"recur_over": "frames", "num_frames": 8, "layers_to_transform": 0, "target_modules": ["fc2", "fc1"]},
        {"recur_over": "frames", "target_modules": r".*visual.*fc2"},
        {"cell": "none", "target_modules": r".*\.fc2", "exclude_modules": ["head"], "rank_pattern": {"fc2": 2}},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_weights": False},
    ],
)
def test_round_trip_through_a_file(fields, tmp_path):
    """What is saved is what is loaded, and saving that again writes the same bytes."""
    config = ReadConfig(**fields)
    config.save_pretrained(tmp_path / "first")
    loaded = ReadConfig.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert loaded == config
    first, second = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("first", "second"))
    assert first == second


def test_defaults_are_the_paper():
    """Vanilla RNN, GELU, no dropout: the module of the paper."""
    config = ReadConfig()
    assert (config.cell, config.act_fn, config.dropout, config.scaling) == ("rnn", "gelu", 0.0, 1.0)
    assert config.peft_type is PeftType.READ
