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
        ({"recur_over": "frames"}, "needs `num_frames`"),
        ({"recur_over": "frames", "num_frames": 0}, "`num_frames` must be a positive integer"),
        ({"num_frames": 4}, "`num_frames` is for `recur_over='frames'` only"),
        ({"layers_pattern": "layers"}, "`layers_pattern` says what `layers_to_transform` indexes"),
        (
            {"layers_to_transform": [0], "target_modules": ".*fc2"},
            "doesn't go with a `target_modules` that is a string",
        ),
        ({"task_type": "SEGMENTATION"}, "Invalid task type"),
        ({"r": 10**12}, "`r` must be at most 1048576, got 1000000000000"),
        ({"r": 10**400}, "`r` must be at most"),
        ({"r": 10**5000}, "`r` must be at most 1048576, got <int>"),
        ({"scaling": 10**400}, "`scaling` must be from -1e.06 to 1e.06"),
        ({"scaling": 1e308}, "`scaling` must be from"),
        ({"scaling": -1e39}, "`scaling` must be from"),
        ({"scaling": [1.0]}, "`scaling` must be a finite number"),
        ({"dropout": 10**400}, "`dropout` must be a number"),
        ({"act_fn": []}, r"`act_fn` must be one of .*, got \[\]"),
        ({"act_fn": {}}, "`act_fn` must be one of"),
        ({"cell": ["rnn"]}, "`cell` must be one of"),
        ({"rank_pattern": 0.5}, "`rank_pattern` must be a dict"),
        ({"rank_pattern": [4]}, "`rank_pattern` must be a dict"),
        ({"rank_pattern": "abc"}, "`rank_pattern` must be a dict"),
        ({"rank_pattern": {"([": 4}}, "`rank_pattern` isn't a regular expression"),
        ({"rank_pattern": {".*": 10**12}}, r"`rank_pattern\['\.\*'\]` must be at most"),
        ({"target_modules": 3}, "`target_modules` must be a list of names, got 3"),
        ({"target_modules": {}}, "`target_modules` must be a list of names"),
        ({"target_modules": []}, "`target_modules` must be a list of names"),
        ({"target_modules": ""}, "`target_modules` must be a regular expression"),
        ({"target_modules": [1]}, "`target_modules` must be a list of names, got 1 in it"),
        ({"target_modules": [["a"]]}, "`target_modules` must be a list of names"),
        ({"target_modules": [None]}, "`target_modules` must be a list of names"),
        ({"target_modules": "(["}, "`target_modules` isn't a regular expression: unterminated"),
        ({"target_modules": "a" * 20_000}, "`target_modules` must have at most 10,000 characters"),
        ({"target_modules": [str(n) for n in range(100_000)]}, "`target_modules` must have at most 2,000 names"),
        ({"exclude_modules": "(["}, "`exclude_modules` isn't a regular expression"),
        ({"exclude_modules": 3}, "`exclude_modules` must be a list of names"),
        ({"layers_to_transform": "x"}, "`layers_to_transform` must be the index of a block"),
        ({"layers_to_transform": {}}, "`layers_to_transform` must be the index of a block"),
        ({"layers_to_transform": [10**30]}, "`layers_to_transform` must hold indices of at most"),
        ({"layers_to_transform": [-1]}, "`layers_to_transform` must be the index of a block"),
        ({"layers_to_transform": [True]}, "`layers_to_transform` must be the index of a block"),
        ({"layers_to_transform": 0, "layers_pattern": "(["}, "`layers_pattern` isn't a regular expression"),
        ({"recur_over": "frames", "num_frames": 10**12}, "`num_frames` must be at most"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` must be a list of names"),
        ({"modules_to_save": [3]}, "`modules_to_save` must be a list of names, got 3 in it"),
        ({"modules_to_save": [""]}, "`modules_to_save` must be a list of names"),
        ({"modules_to_save": ["(a+)+!"]}, "`modules_to_save` must be a list of names of modules"),
        ({"modules_to_save": ["../../x"]}, "`modules_to_save` must be a list of names of modules"),
        ({"inference_mode": "x"}, "`inference_mode` must be True or False"),
        ({"base_model_name_or_path": ["a"]}, "`base_model_name_or_path` must be a string"),
        ({"revision": 3}, "`revision` must be a string"),
        ({"trainable_token_indices": 3}, "`trainable_token_indices` must be a list of token indices"),
        ({"trainable_token_indices": [-1]}, "`trainable_token_indices` must be a list of token indices"),
        ({"trainable_token_indices": [1, 1]}, "`trainable_token_indices` names a token twice"),
        ({"trainable_token_indices": {"wte": ["a"]}}, r"`trainable_token_indices\['wte'\]` must be a list"),
        ({"ensure_weight_tying": "yes"}, "`ensure_weight_tying` must be True or False"),
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
        {"cell": "none", "target_modules": r".*\.fc2", "exclude_modules": ["head"], "rank_pattern": {"fc2": 2}},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_weights": False},
        {"trainable_token_indices": [3, 7], "ensure_weight_tying": True},
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
