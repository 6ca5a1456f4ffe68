"""What a Trainer leaves behind, and what it makes anew: hooks, modes, models of `model_init`, trials of a search."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from alignment import CASES, arguments, collate, steps_logged, tokenizer
from alignment import trainer_of as make_trainer
from alignment_batches import SAMPLES, marked
from alignment_inputs import MODELS
from alignment_models import bert
from datasets import Dataset
from transformers import default_data_collator

from peft_read import PvlaArguments, PvlaMixin, PvlaTrainer, PvlaTrainingArguments


TEXT = CASES["text encoder"]
SOURCES = {
    "last_block": TEXT,
    "all_blocks": CASES["all blocks"],
    "bottleneck": CASES["bottleneck without recurrence"],
    "inputs": MODELS["own model"],
    "towers": CASES["siglip"],
}


def trainer_of(case, model, folder, **options):
    """Of the example's model, whose collator takes all columns, too."""
    return make_trainer(case, model, folder, **({"remove_unused_columns": case is not SOURCES["inputs"]} | options))


def hooks(model):
    """How many hooks of any kind each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {name: tuple(len(getattr(m, kind)) for kind in kinds) for name, m in model.named_modules()}


@pytest.mark.parametrize("name", SOURCES)
def test_hooks_are_there_while_a_forward_is_recorded(name, tmp_path):
    """Three Trainers that train, evaluate and draw plans leave none; `unload` gives the model without any."""
    case, model = SOURCES[name], SOURCES[name].model()
    before = hooks(model)
    for _ in range(3):
        trainer = trainer_of(case, model, tmp_path, pvla_health_steps=1)
        assert hooks(model) == before
        trainer.train()
        trainer.evaluate()
        trainer.transport_plans(case.data()[:2])
        assert hooks(model) == before
    assert hooks(model.unload()) == hooks(case.model().unload())


def test_hooks_go_where_a_forward_fails(tmp_path):
    """The next one is as before."""
    model = bert()
    trainer = trainer_of(TEXT, model, tmp_path)
    before = hooks(model)
    batch = collate(TEXT, marked())
    with pytest.raises(IndexError):
        trainer.compute_loss(model, batch | {"labels": torch.full((SAMPLES,), 99)})
    assert hooks(model) == before
    trainer.train()


def test_nothing_of_a_forward_is_kept(tmp_path):
    """After a step, and after an evaluation, no states and no arguments of the blocks live on."""
    model = bert()
    trainer = trainer_of(TEXT, model, tmp_path, pvla_health_steps=1)
    kept = []
    model.get_base_model().bert.encoder.layer[1].register_forward_hook(
        lambda m, a, output: kept.append(weakref.ref(output if torch.is_tensor(output) else output[0]))
    )
    trainer.train()
    trainer.evaluate()
    gc.collect()
    assert kept
    assert not any(reference() is not None for reference in kept)


@pytest.mark.parametrize("training", [True, False])
def test_plans_leave_the_mode(training, tmp_path):
    """Of each module, as it was, though they are made in evaluation mode."""
    model = bert()
    model.train(training)
    model.get_base_model().bert.encoder.layer[0].train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    trainer = trainer_of(TEXT, model, tmp_path)
    assert {name: module.training for name, module in model.named_modules()} == modes
    seen = []
    model.get_base_model().bert.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    trainer.transport_plans(marked(3))
    assert seen == [False]
    assert {name: module.training for name, module in model.named_modules()} == modes


def run_of_init(folder, init, **options):
    args = PvlaTrainingArguments(**(arguments(folder) | options))
    return PvlaTrainer(
        args=args, model_init=init, train_dataset=marked(), eval_dataset=marked(), data_collator=default_data_collator
    )


def test_a_model_that_is_made_by_a_function(tmp_path):
    """`model_init` makes another for each run: it is that one whose states are aligned."""
    options = {"pvla_weight": 0.7, "pvla_health_steps": 1, "num_train_epochs": 3}
    expected = trainer_of(TEXT, bert(), tmp_path, train=marked(), evaluate=marked(), **options)
    expected.train()
    trainer = run_of_init(tmp_path, lambda: bert(), **options)
    for _ in range(2):
        trainer.train()
        for entry, other in zip(steps_logged(trainer), steps_logged(expected), strict=True):
            assert entry == pytest.approx(other, abs=1e-6)
    metrics = [t.evaluate() for t in (trainer, expected)]
    assert metrics[0]["eval_pvla_loss"] == pytest.approx(metrics[1]["eval_pvla_loss"], abs=1e-6)


def test_the_best_model_of_a_run_by_init(tmp_path):
    """`load_best_model_at_end` by one of the loss's parts."""
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "pvla_weight": 0.5}
    options |= {"metric_for_best_model": "eval_task_loss", "greater_is_better": False, "num_train_epochs": 3}
    trainer = run_of_init(tmp_path, lambda: bert(), **options)
    trainer.train()
    evaluated = [entry["eval_task_loss"] for entry in trainer.state.log_history if "eval_task_loss" in entry]
    assert trainer.state.best_metric == min(evaluated)


@pytest.mark.parametrize("start", [0.3, 0.0])
def test_a_trials_values_are_the_runs(start, tmp_path):
    """Weight, mass and states as the trial says, in each trial anew; also where PVLA was off before."""
    optuna = pytest.importorskip("optuna", reason="the search's backend")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = run_of_init(tmp_path, lambda: bert(), pvla_weight=start, eval_strategy="epoch")
    values = [
        {"pvla_weight": 0.2, "pvla_mass": 0.25, "pvla_states": "all_blocks"},
        {"pvla_weight": 0.9, "pvla_mass": 1.0, "pvla_states": "last_block"},
    ]
    logs = []

    def objective(metrics):
        logs.append(steps_logged(trainer))
        return metrics["eval_task_loss"]

    best = trainer.hyperparameter_search(
        direction="minimize",
        backend="optuna",
        hp_space=lambda trial: values[trial.number],
        compute_objective=objective,
        n_trials=2,
    )
    assert best.run_id in ("0", "1")
    for found, given in zip(logs, values, strict=True):
        expected = trainer_of(TEXT, bert(), tmp_path, train=marked(), **given)
        expected.train()
        for entry, other in zip(found, steps_logged(expected), strict=True):
            for part in ("loss", "task_loss", "pvla_loss"):
                assert entry[part] == pytest.approx(other[part], abs=1e-6), part


def test_a_trials_value_that_cannot_be(tmp_path):
    """Is an error when the run starts."""
    trainer = run_of_init(tmp_path, lambda: bert(), pvla_weight=0.3)
    trainer.args.pvla_mass = 2.0
    with pytest.raises(ValueError, match=r"mass=2\.0"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.parametrize("states", ["last_block", "inputs"])
def test_one_forward_a_step_over_trl(name, states, tmp_path):
    """As many calls of blocks and of the head as TRL alone makes, in training and in evaluation."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="older ones need Triton in this Trainer")

    @dataclass
    class Arguments(PvlaArguments, trl.SFTConfig):
        pass

    class PvlaSFTTrainer(PvlaMixin, trl.SFTTrainer):
        pass

    counts = {}
    for weight in (0.0, 0.7):
        case = MODELS["trained embeddings" if name == "llama" else "llava"]
        rows, model = case.data(), case.model()
        base = model.get_base_model()
        called = counts[weight] = {"block": 0, "head": 0}
        block = base.model.layers[1] if name == "llama" else base.model.language_model.layers[1]
        for what, module in (("block", block), ("head", base.lm_head)):
            module.register_forward_hook(lambda *_, w=what, c=called: c.update({w: c[w] + 1}))
        data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
        options = {"pvla_weight": weight, "pvla_states": states, "bf16": False, "gradient_checkpointing": False}
        options |= {"eos_token": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        options |= {"remove_unused_columns": False, "num_train_epochs": 2}
        trainer = PvlaSFTTrainer(
            model,
            Arguments(**(arguments(tmp_path) | options)),
            data_collator=default_data_collator,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer(),
        )
        trainer.train()
        trainer.evaluate()
    assert counts[0.7] == counts[0.0]
    assert counts[0.7]["block"] == 3
