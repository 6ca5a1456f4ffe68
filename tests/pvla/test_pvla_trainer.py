"""The Trainers with PVLA: the same numbers however the work is divided, and weights by a share of the gradient."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from alignment import CASES, CAUSAL, Case, step_by_hand, steps_logged, trainer_of, weights
from alignment_batches import SAMPLES, generated, marked, spoken, words
from alignment_models import bart, bert, build
from alignment_runs import named, read_gradients, trained, without_video
from models import bert_config, llama_config, t5_config
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
)

from peft_read.pvla.step_mean import StepMeanMixin


TEXT = CASES["text encoder"]


def tagged(rows=SAMPLES):
    return [example | {"labels": words(row) % 3} for row, example in enumerate(marked(rows, embedded=False))]


HEADS = {
    "classifier": TEXT,
    "mean of tokens": Case(lambda: build(BertForTokenClassification, bert_config(num_labels=3)), tagged, None),
    "causal": CAUSAL,
    "causal, classifier": Case(lambda: build(LlamaForSequenceClassification, llama_config(num_labels=3)), named, None),
    "bart": Case(bart, generated, None, seq2seq=True),
    "t5": Case(lambda: build(T5ForConditionalGeneration, t5_config()), generated, None, seq2seq=True),
    "smoothed": Case(bert, named, None, options={"label_smoothing_factor": 0.1}),
    "smoothed, causal": Case(
        lambda: build(LlamaForCausalLM, llama_config()), spoken, None, options={"label_smoothing_factor": 0.1}
    ),
    "smoothed, mean": Case(
        lambda: build(BertForMaskedLM, bert_config()), spoken, None, options={"label_smoothing_factor": 0.1}
    ),
    "all blocks": CASES["all blocks"],
}


def token_loss(outputs, labels, num_items_in_batch=None):
    loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


HEADS["own function"] = Case(
    lambda: build(BertForMaskedLM, bert_config()), spoken, None, arguments={"compute_loss_func": token_loss}
)


def assert_same_run(run, expected, tolerance=1e-5):
    for entry, other in zip(run[0], expected[0], strict=True):
        for part in ("loss", "task_loss", "pvla_loss"):
            assert entry[part] == pytest.approx(other[part], abs=tolerance), part
    assert run[1].keys() == expected[1].keys()
    for name, value in run[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", HEADS)
def test_accumulated_steps_are_one_step(name, tmp_path):
    """Batches of 8 equal 4 batches of 2, though the rows differ in labels and not all hold a video."""
    case = HEADS[name]
    data = case.data() + [{**example} for example in case.data()[::-1]]
    whole = trained(case, tmp_path, train=data, pvla_weight=0.7)
    parts = trained(case, tmp_path, batch=2, train=data, gradient_accumulation_steps=4, pvla_weight=0.7)
    assert_same_run(parts, whole)
    for entry in whole[0]:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.7 * entry["pvla_loss"], abs=1e-5)


# Its new name isn't known before transformers 5.23.
OLD_NAME = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
RECOMPUTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@OLD_NAME
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(RECOMPUTED, id="recomputed"),
        pytest.param(COMPILED, id="compiled"),
        pytest.param({"dataloader_drop_last": True, "pvla_health_steps": 1}, id="health"),
        pytest.param({"auto_find_batch_size": True}, id="auto_find_batch_size"),
    ],
)
def test_the_same_numbers_under(options, tmp_path):
    """Recomputed blocks, a compiled model, measurements in between: none of them changes the run."""
    whole = trained(TEXT, tmp_path, batch=4, pvla_weight=0.7)
    assert_same_run(trained(TEXT, tmp_path, batch=4, pvla_weight=0.7, **options), whole)


@OLD_NAME
@pytest.mark.parametrize("options", [RECOMPUTED, COMPILED], ids=["recomputed", "compiled"])
def test_measuring_the_gradients_under(options, tmp_path):
    """The gradient share takes gradients beside the backward pass, which checkpoints and compilers must allow."""
    whole = trained(TEXT, tmp_path, batch=4, pvla_gradient_share=0.2, pvla_health_steps=1)
    parts = trained(TEXT, tmp_path, batch=4, pvla_gradient_share=0.2, pvla_health_steps=1, **options)
    assert_same_run(parts, whole, 1e-4)
    assert parts[0][-1]["pvla_gradient_share"] == pytest.approx(whole[0][-1]["pvla_gradient_share"], abs=1e-4)


@OLD_NAME
@pytest.mark.parametrize(
    "refused", [{"pvla_states": "bottleneck"}, {"pvla_gradient_share": 0.1}], ids=lambda o: next(iter(o))
)
def test_checkpointing_that_keeps_no_graph_is_refused(refused, tmp_path):
    """Reentrant checkpoints hide what lies in them, and allow no gradients but those of the backward pass."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match=r"use_reentrant.*False"):
        trained(TEXT, tmp_path, train=named(), **options, **refused)


@pytest.mark.parametrize("name", ["text encoder", "image placeholders", "siglip", "clip, patches"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_mixed_precision(name, base, tmp_path):
    """Under autocast to bfloat16, over a base in either dtype, the losses are about those of float32."""
    case = replace(CASES[name], data=named) if name == "text encoder" else CASES[name]
    task, aligned = step_by_hand(case, case.model(), case.data(), 0.0)[:2]
    trainer = trainer_of(case, case.model().to(base), tmp_path, bf16=True)
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log["task_loss"] == pytest.approx(float(task), rel=0.05)
    assert log["pvla_loss"] == pytest.approx(float(aligned), rel=0.05)
    assert trainer.evaluate()["eval_pvla_loss"] == pytest.approx(log["pvla_loss"], rel=0.1)


@pytest.mark.parametrize("share", [None, 0.2])
def test_resuming(share, tmp_path):
    """6 steps equal 3 and, from the checkpoint in a new Trainer, 3 more; a measured weight is kept meanwhile."""
    data = marked(24)
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "batch": 4, "save_strategy": "steps", "save_steps": 3}
    options |= {"pvla_gradient_share": share} if share else {"pvla_weight": 0.7}
    whole = trained(TEXT, tmp_path / "whole", train=data, **options)
    second = trainer_of(TEXT, bert(), tmp_path / "resumed", train=data, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_run((steps_logged(second), weights(second.model)), whole, 1e-6)
    if share:
        assert len({entry["pvla_weight"] for entry in steps_logged(second)}) == 1


def test_training_twice_is_training_anew(tmp_path):
    """Nothing of a first run is left in a second one: no weight, no losses that were not logged any more."""
    options = {"batch": 2, "pvla_gradient_share": 0.2, "logging_steps": 3, "max_steps": 4}
    trainer = trainer_of(TEXT, bert(), tmp_path, **options)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    first = steps_logged(trainer)
    trainer.model.load_state_dict({name: value * 0.9 for name, value in start.items()})
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    other = bert()
    other.load_state_dict({name: value * 0.9 for name, value in start.items()})
    fresh = trainer_of(TEXT, other, tmp_path, **options)
    fresh.train()
    assert steps_logged(trainer) != first
    for entry, expected in zip(steps_logged(trainer), steps_logged(fresh), strict=True):
        assert {**entry, "grad_norm": 0} == pytest.approx({**expected, "grad_norm": 0}, abs=1e-6)


def test_share_of_the_gradient(tmp_path):
    """The weight makes the alignment's gradient on READ's weights the share asked for; every 10 steps anew."""
    data = marked(48)
    model = bert()
    task, aligned = read_gradients(TEXT, model, data[:4])
    trainer = trainer_of(TEXT, model, tmp_path, data, batch=4, pvla_gradient_share=0.05, pvla_health_steps=4)
    trainer.train()
    logs = steps_logged(trainer)
    assert logs[0]["pvla_weight"] == pytest.approx(0.05 * task / aligned, rel=1e-3)
    assert logs[0]["pvla_gradient_share"] == pytest.approx(0.05, rel=1e-3)
    assert "pvla_gradient_share" not in logs[1]
    assert logs[4]["pvla_gradient_share"] != pytest.approx(0.05, rel=1e-3)
    assert len({log["pvla_weight"] for log in logs[:10]}) == 1
    assert logs[10]["pvla_weight"] == logs[11]["pvla_weight"] != logs[9]["pvla_weight"]
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + log["pvla_weight"] * log["pvla_loss"], abs=1e-5)


def test_share_where_the_first_batches_hold_no_video(tmp_path):
    """Nothing to align gives no weight, not an endless one; the first batch with a video does."""
    data = marked(20)
    data[:8] = [without_video(example) for example in data[:8]]
    trainer = trainer_of(TEXT, bert(), tmp_path, data, batch=4, pvla_gradient_share=0.05, pvla_health_steps=1)
    trainer.train()
    logs = steps_logged(trainer)
    assert not any("pvla_weight" in log for log in logs[:2])
    assert [log["pvla_loss"] for log in logs[:2]] == [0, 0]
    assert 0 < logs[2]["pvla_weight"] < 100
    assert logs[2]["pvla_gradient_share"] == pytest.approx(0.05, rel=1e-3)
    assert all(torch.isfinite(value).all() for value in weights(trainer.model).values())
    # In the middle of a run the weight stays.
    data = marked(44)
    data[40:] = [without_video(example) for example in data[40:]]
    trainer = trainer_of(TEXT, bert(), tmp_path, data, batch=4, pvla_gradient_share=0.05)
    trainer.train()
    logs = steps_logged(trainer)
    assert logs[10]["pvla_weight"] == logs[9]["pvla_weight"]


@pytest.mark.parametrize(("shifts", "expected"), [(True, 3), (False, 5)])
def test_labels_are_counted_as_the_trainer_counts_them(shifts, expected):
    """Without those at the first position where the loss shifts them, of which there are two here."""
    labels = torch.tensor([[7, -100, 8, 9], [6, -100, -100, 5]])
    counting = SimpleNamespace(_loss_shifts_labels=shifts)
    assert StepMeanMixin._count_labels(counting, {"labels": labels}) == expected
    assert StepMeanMixin._count_labels(counting, {"labels": labels, "shift_labels": labels[:, 1:]}) == 3
