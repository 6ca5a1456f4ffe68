"""Pairs without labels beside the labelled data: what a step aligns, however the work is divided."""

import copy
from dataclasses import dataclass

import pytest
import torch
from alignment import (
    CASES,
    CAUSAL,
    ITERATIONS,
    RATE,
    REG,
    alignment,
    arguments,
    collate,
    step_by_hand,
    steps_logged,
    tokenizer,
    trainer_of,
    weights,
)
from alignment_batches import marked, pictured, spoken
from alignment_inputs import MODELS, grounding, of_grounding, watched
from alignment_models import bert
from datasets import Dataset, IterableDataset
from torch import nn

from peft_read import PvlaArguments, PvlaLoss, PvlaMixin
from peft_read.pvla.pairs import PairBatches


OWN = MODELS["own model"]


def captioned_videos(rows=12):
    """Pairs of the own model: other videos and sentences than the labelled ones, no labels."""
    return watched(rows + 20, labels=False)[20:]


def trainer_with_pairs(folder, pairs=None, case=OWN, model=None, **options):
    given = copy.copy(case)
    given.arguments = case.arguments | {"pairs_dataset": captioned_videos() if pairs is None else pairs}
    return trainer_of(given, model or case.model(), folder, **({"remove_unused_columns": False} | options))


def test_each_step_has_its_batch():
    """The same whenever training starts; all pairs once before one comes again; processes share a batch."""
    pairs = PairBatches(list(range(10)), list, 4, seed=3)
    steps = [pairs.at(step) for step in range(5)]
    seen = [pair for step in steps for pair in step]
    assert sorted(seen) == sorted([*range(10)] * 2)
    assert sorted(seen[:10]) == list(range(10))
    later = PairBatches(list(range(10)), list, 4, seed=3)
    assert [later.at(step) for step in (3, 4, 0)] == [steps[3], steps[4], steps[0]]
    halves = [PairBatches(list(range(10)), list, 2, seed=3, rank=rank, processes=2) for rank in range(2)]
    assert [halves[0].at(step) + halves[1].at(step) for step in range(5)] == steps
    assert PairBatches(list(range(10)), list, 4, seed=4).at(0) != steps[0]
    before = torch.random.get_rng_state()
    PairBatches(list(range(10)), list, 4).at(0)
    assert torch.equal(torch.random.get_rng_state(), before)


def step_with_pairs(model, labelled, pairs, weight):
    """Losses of a step by hand, and the weights after it."""
    model = copy.deepcopy(model).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    task = model(**{n: v for n, v in collate(OWN, labelled).items() if "token_mask" not in n}).loss
    aligned = alignment(of_grounding(model, collate(OWN, pairs), None, {}))
    grads = torch.autograd.grad(task + weight * aligned, list(trained.values()))
    after = {name: p.detach() - RATE * g for (name, p), g in zip(trained.items(), grads, strict=True)}
    return task.item(), aligned.item(), after


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_step_aligns_a_batch_of_pairs(accumulated, tmp_path):
    """One for each optimizer step, by hand: the labelled samples have the task, the pairs the alignment."""
    model, pairs = grounding(), captioned_videos()
    options = {"pvla_pairs_batch_size": 5, "pvla_weight": 0.7, "max_steps": 1, "seed": 11}
    options |= {"batch": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    expected_model = copy.deepcopy(model)
    trainer = trainer_with_pairs(tmp_path, pairs, model=model, **options)
    trainer.train()
    chosen = PairBatches(pairs, list, 5, seed=11).at(0)
    # A batch's loss is the mean over its frames, and a step's the mean over its batches.
    size = 8 // accumulated
    tasks = [step_with_pairs(expected_model, watched()[i : i + size], chosen, 0.7) for i in range(0, 8, size)]
    (log,) = steps_logged(trainer)
    assert log["task_loss"] == pytest.approx(sum(task for task, _, _ in tasks) / accumulated, abs=1e-5)
    assert log["pvla_loss"] == pytest.approx(tasks[0][1], abs=1e-5)
    assert log["loss"] == pytest.approx(log["task_loss"] + 0.7 * log["pvla_loss"], abs=1e-5)
    for name, value in weights(model).items():
        mean = sum(after[name] for _, _, after in tasks) / accumulated
        torch.testing.assert_close(value, mean, rtol=1e-3, atol=1e-6)


def test_no_pass_through_the_blocks_for_inputs(tmp_path):
    """The labelled batch goes through once, the pairs stop before; block states of pairs stop before the heads."""
    counts = {}

    def count(name):
        return lambda *_: counts.update({name: counts.get(name, 0) + 1})

    model = grounding()
    trainer = trainer_with_pairs(tmp_path, model=model, pvla_pairs_batch_size=4)
    model.get_base_model().text_model.encoder.layer[0].register_forward_hook(count("block"))
    model.get_base_model().frame_projection.register_forward_hook(count("projection"))
    trainer.train()
    assert counts == {"block": 1, "projection": 2}
    counts.clear()
    model = bert()
    model.get_base_model().bert.encoder.layer[0].register_forward_hook(count("block"))
    model.get_base_model().classifier.register_forward_hook(count("head"))
    pairs = [{k: v for k, v in example.items() if k != "labels"} for example in marked(6)]
    trainer = trainer_with_pairs(tmp_path, pairs, CASES["text encoder"], model, pvla_pairs_batch_size=6)
    trainer.train()
    assert counts == {"block": 2, "head": 1}
    _, aligned, _, _ = step_by_hand(CASES["text encoder"], bert(), marked(6), 0.0)
    assert steps_logged(trainer)[0]["pvla_loss"] == pytest.approx(float(aligned), abs=1e-5)


def test_towers_align_pairs(tmp_path):
    """Of a dual encoder both towers run, on other samples than the task's."""
    case = CASES["siglip"]
    pairs = case.data()[::-1][:4]
    trainer = trainer_with_pairs(tmp_path, pairs, case, pvla_pairs_batch_size=4, learning_rate=0.0)
    trainer.train()
    _, aligned, _, _ = step_by_hand(case, case.model(), pairs, 0.0)
    assert steps_logged(trainer)[0]["pvla_loss"] == pytest.approx(float(aligned), abs=1e-5)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_batch_has_pairs(size):
    """A whole number of them, at least one."""
    with pytest.raises(ValueError, match=f"batch_size={size}: expected a whole number of pairs, at least 1"):
        PairBatches(list(range(5)), list, size)


def noisy(examples):
    """A collator that draws random numbers for pairs, as augmentation does."""
    batch = OWN.collator(examples)
    if "labels" in batch:  # of which a plain Trainer's loader takes one ahead, and so resumes with other numbers
        return batch
    return batch | {"frame_features": batch["frame_features"] + 0.1 * torch.randn_like(batch["frame_features"])}


def test_resuming_is_on_the_same_curve(tmp_path):
    """6 steps equal 3 and, from the checkpoint in a new Trainer, 3 more, with random collators and negatives."""
    case = copy.copy(OWN)
    case.collator = noisy
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "batch": 4, "pvla_pairs_batch_size": 5, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3, "pvla_negatives": True, "pvla_weight": 0.7}
    whole = trainer_with_pairs(tmp_path / "whole", case=case, **options)
    whole.train()
    second = trainer_with_pairs(tmp_path / "resumed", case=case, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    logs = [steps_logged(trainer)[-3:] for trainer in (whole, second)]
    for entry, other in zip(*logs, strict=True):
        for part in ("loss", "task_loss", "pvla_loss"):
            assert other[part] == pytest.approx(entry[part], abs=1e-6), part
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(second.model)[name], value, rtol=0, atol=1e-6)


def test_evaluation_aligns_what_is_evaluated(tmp_path):
    """With pairs in training, too."""
    trainer = trainer_with_pairs(tmp_path, pvla_pairs_batch_size=4, pvla_weight=0.7, learning_rate=0.0)
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        pairs = of_grounding(trainer.model, collate(OWN, watched()), None, {})
    assert metrics["eval_pvla_loss"] == pytest.approx(float(alignment(pairs)), abs=1e-5)


def test_pairs_in_a_table_of_columns(tmp_path):
    """A `Dataset` of datasets, of which columns that the model doesn't know are removed as in the training data."""
    rows = [{k: v.tolist() for k, v in row.items()} | {"caption": "text"} for row in spoken()]
    pairs = Dataset.from_list([{k: v for k, v in row.items() if k != "labels"} for row in rows])
    options = {"pvla_pairs_batch_size": 8, "learning_rate": 0.0, "remove_unused_columns": True}
    trainer = trainer_with_pairs(tmp_path, pairs, CAUSAL, **options)
    trainer.train()
    _, aligned, _, _ = step_by_hand(CAUSAL, CAUSAL.model(), spoken(), 0.0)
    assert steps_logged(trainer)[0]["pvla_loss"] == pytest.approx(float(aligned), abs=1e-5)


def test_pairs_that_are_refused(tmp_path):
    """Streams, fewer pairs than a batch, and pairs of which video and text can't be told."""
    with pytest.raises(ValueError, match=r"3 pairs, fewer than one batch of 16.*lower pvla_pairs_batch_size"):
        trainer_with_pairs(tmp_path, captioned_videos(3))
    stream = IterableDataset.from_generator(lambda: iter(captioned_videos()))
    with pytest.raises(ValueError, match="no length or no items by index"):
        trainer_with_pairs(tmp_path, stream)
    unmarked = [{k: v for k, v in row.items() if "token_mask" not in k and k != "labels"} for row in marked(16)]
    with pytest.raises(ValueError, match="can't tell which tokens are video"):
        trainer_with_pairs(tmp_path, unmarked, CASES["text encoder"])
    with pytest.raises(ValueError, match="raise pvla_pairs_batch_size"):
        trainer_with_pairs(tmp_path, pvla_negatives=True, pvla_pairs_batch_size=1)
    with pytest.raises(ValueError, match="pvla_pairs_batch_size=0"):
        trainer_with_pairs(tmp_path, pvla_pairs_batch_size=0)


def test_without_a_weight_pairs_are_not_read(tmp_path):
    """The Trainer is then transformers' own."""

    class Unread(list):
        def __getitem__(self, index):
            raise AssertionError("read")

    trainer_with_pairs(tmp_path, Unread(captioned_videos()), pvla_weight=0.0).train()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trl_with_pairs(tmp_path):
    """TRL's Trainer aligns pairs as ours does: one forward of the language model for the task, none for them."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="older ones need Triton in this Trainer")

    @dataclass
    class Arguments(PvlaArguments, trl.SFTConfig):
        pass

    class PvlaSFTTrainer(PvlaMixin, trl.SFTTrainer):
        pass

    case = MODELS["llava"]
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in pictured()])
    pairs = Dataset.from_list([{k: v.tolist() for k, v in row.items() if k != "labels"} for row in pictured(14)[8:]])
    model = case.model()
    blocks, heads = [], []
    model.get_base_model().model.language_model.layers[0].register_forward_hook(lambda *_: blocks.append(1))
    model.get_base_model().lm_head.register_forward_hook(lambda *_: heads.append(1))
    options = {"pvla_weight": 0.7, "bf16": False, "gradient_checkpointing": False, "eos_token": None}
    options |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_steps": 2}
    options |= {"pvla_states": "inputs", "pvla_pairs_batch_size": 6, "pvla_negatives": True, "learning_rate": 0.0}
    trainer = PvlaSFTTrainer(
        model,
        Arguments(**(arguments(tmp_path) | options)),
        data_collator=lambda rows: nn.utils.rnn.pad_sequence and _stack(rows),
        train_dataset=data,
        pairs_dataset=pairs,
        processing_class=tokenizer(),
    )
    trainer.train()
    assert len(blocks) == 2
    with torch.no_grad():
        expected = PvlaLoss(reg=REG, n_iter=ITERATIONS, negatives=True)
        seen = case.compared(model, batch := _stack(list(pairs)), None, _projected(model, batch))
        padded = [nn.utils.rnn.pad_sequence(list(side), True) for side in zip(*seen, strict=True)]
        masks = [
            nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in side], True) for side in zip(*seen, strict=True)
        ]
        loss = float(expected(*padded, masks[0].bool(), masks[1].bool()))
    assert steps_logged(trainer)[0]["pvla_loss"] == pytest.approx(loss, abs=1e-4)


def _stack(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def _projected(model, batch):
    heard, name = {}, "base_model.model.model.multi_modal_projector"
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, output: heard.update({name: output}))
    model(**batch)
    hook.remove()
    return heard
