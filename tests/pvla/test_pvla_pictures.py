"""What people look at: the figures of health by hand; the plan as a picture, in files and in TensorBoard."""

import math

import pytest
import torch
import torch.nn.functional as F
from alignment import CASES, ITERATIONS, REG, alignment, collate, forward, steps_logged, tokenizer, trainer_of
from alignment_batches import marked, places
from alignment_models import VISUAL
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_read import PvlaLoss, partial_transport, plot_plan
from peft_read.pvla.block_states import BlockStates


TEXT = CASES["text encoder"]


@torch.no_grad()
def found(case, examples):
    """Pairs of states, and plan and residual of each as shares of the mass, sample by sample."""
    pairs = forward(case, case.model(), collate(case, examples))[1]
    plans = []
    for video, words in pairs:
        cost = 1 - F.normalize(video, dim=-1) @ F.normalize(words, dim=-1).T
        plan = partial_transport(cost[None], 0.5, REG, n_iter=ITERATIONS)
        plans.append((plan.plan[0] / 0.5, plan.residual[0]))
    return pairs, plans


def gaps_of_towers(case, data, pairs):
    """Each own pair against the video with another sample's words, which haven't seen a video."""
    return [
        float(alignment([(video, pairs[(row - 1) % len(pairs)][1])]) - alignment([(video, own)]))
        for row, (video, own) in enumerate(pairs)
    ]


def gaps_read_anew(case, data, pairs):
    """Each own pair against the same words, read with the video of the next sample that has as many tokens."""
    gaps, blocks = [], len(pairs) // len(data)
    for row, example in enumerate(data):
        own = example["video_token_mask"].bool()
        others = [*data[row + 1 :], *data[:row]]
        other = next((x for x in others if x["video_token_mask"].sum() == own.sum()), None)
        if other is not None:
            mixed = example["inputs_embeds"].clone()
            mixed[own] = other["inputs_embeds"][other["video_token_mask"].bool()]
            read = forward(case, case.model(), collate(case, [example | {"inputs_embeds": mixed}]))[1]
            own_pairs = [pairs[block * len(data) + row] for block in range(blocks)]
            gaps += [float(alignment([x]) - alignment([y])) for x, y in zip(read, own_pairs, strict=True)]
    return gaps


@pytest.mark.parametrize(
    ("name", "gaps"),
    [("text encoder", gaps_read_anew), ("all blocks", gaps_read_anew), ("clip, patches", gaps_of_towers)],
    ids=["text encoder", "all blocks", "clip, patches"],
)
@torch.no_grad()
def test_health(name, gaps, tmp_path):
    """Effective pairs, residual and gap to mismatched pairs, by loops over samples."""
    case = CASES[name]
    data = marked(7) if name != "clip, patches" else case.data()[:7]  # a video in every row
    trainer = trainer_of(case, case.model(), tmp_path, data, pvla_health_steps=1)
    with torch.enable_grad():
        trainer.train()
    (log,) = steps_logged(trainer)
    pairs, plans = found(case, data)
    entropies = [sum(-p * math.log(p) for p in plan.flatten().tolist() if p > 0) for plan, _ in plans]
    assert log["pvla_pairs"] == pytest.approx(sum(map(math.exp, entropies)) / len(plans), rel=1e-4)
    assert log["pvla_residual"] == pytest.approx(float(sum(residual for _, residual in plans)) / len(plans), abs=1e-6)
    expected = gaps(case, data, pairs)
    assert len(expected) >= 6
    assert log["pvla_gap"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_gap_is_not_learnt_by_copying_the_sentence(tmp_path):
    """In one sequence, contrast on pairs that have nothing to do with each other is won by copying words into frames.

    Then the words of another sample, taken from that sample's own forward, seem far; read anew with the video, no gap
    is there.
    """
    torch.manual_seed(0)
    model = TEXT.model().train()
    model.requires_grad_(True)
    source, contrast = BlockStates(model, "last_block"), PvlaLoss(reg=REG, n_iter=30, negatives=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def random_pairs():
        batch = collate(TEXT, [example for example in marked(16) if example["video_token_mask"].sum() == 3] * 2)
        return batch | {"inputs_embeds": torch.randn_like(batch["inputs_embeds"])}

    for _ in range(80):
        batch = random_pairs()
        with source.recording():
            source.run(model, batch)
            loss = contrast(*source.states(model, batch, None)[:4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = random_pairs()
    with torch.no_grad(), source.recording():
        source.run(model, batch)
        video, words, *masks = source.states(model, batch, None)[:4]
    plain = contrast.without_negatives()
    fooled = plain(video, words.roll(1, 0), masks[0], masks[1].roll(1, 0)) - plain(video, words, *masks)
    assert fooled > 0.1
    data = [{name: value[row] for name, value in batch.items()} for row in range(len(batch["labels"]))]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.set_adapter("default")
    trainer = trainer_of(TEXT, model, tmp_path, data, pvla_health_steps=1, learning_rate=0.0)
    trainer.train()
    assert abs(steps_logged(trainer)[0]["pvla_gap"]) < fooled / 5


def test_health_is_measured_every_so_often(tmp_path):
    """At the steps asked for, also of several batches a step; a batch of one has no other sample's words."""
    trainer = trainer_of(TEXT, TEXT.model(), tmp_path, marked(8), batch=1, pvla_health_steps=3)
    trainer.train()
    logs = steps_logged(trainer)
    assert ["pvla_pairs" in log for log in logs] == [step % 3 == 0 for step in range(8)]
    assert not any("pvla_gap" in log for log in logs)
    trainer = trainer_of(TEXT, TEXT.model(), tmp_path, marked(8), batch=1, pvla_health_steps=0)
    trainer.train()
    assert not any("pvla_pairs" in log for log in steps_logged(trainer))


def test_a_picture(tmp_path):
    """The heat map shows the plan, frames from left to right and words from top to bottom, with their labels."""
    plan = torch.tensor([[0.1, 0.0, 0.4], [0.0, 0.5, 0.0]])
    figure = plot_plan(plan, ["a", "dog", "runs"], tmp_path / "plan.png")
    axes = figure.axes[0]
    assert axes.images[0].get_array().T.tolist() == plan.tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "dog", "runs"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("frame", "word")
    assert imread(tmp_path / "plan.png").shape[2] == 4
    assert plot_plan(plan.to(torch.bfloat16).requires_grad_()).axes[0].images[0].get_array().shape == (3, 2)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*one sample"):
        plot_plan(plan[None])
    with pytest.raises(ValueError, match="2 labels for the 3 words"):
        plot_plan(plan, ["a", "dog"])


def test_a_picture_of_a_long_video(tmp_path):
    """Thousands of visual tokens, as vision-language models have them, still make a picture that can be taken."""
    plot_plan(torch.ones(3000, 40) / 1.2e5, path=tmp_path / "plan.png")
    assert max(imread(tmp_path / "plan.png").shape) < 5000


class Drawn:
    """The figures that were sent to TensorBoard."""

    def __init__(self, monkeypatch):
        self.plans = []
        monkeypatch.setattr("peft_read.pvla.picture.plot_plan", self.draw)

    def draw(self, plan, words=None, path=None):
        self.plans.append((plan, words, path))
        return plot_plan(plan, words, path)


@pytest.mark.parametrize("name", ["text encoder", "all blocks", "image placeholders", "clip, patches"])
def test_pictures_of_evaluations(name, tmp_path, monkeypatch):
    """At each evaluation a PNG, and the same in TensorBoard; the first valid sample's plan, with its words' names."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    drawn = Drawn(monkeypatch)
    case = CASES[name]
    data = case.data() if name == "image placeholders" or name == "clip, patches" else marked(4, embedded=False)
    if "video_token_mask" in data[0]:
        data[0] = data[0] | {"video_token_mask": places()}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "report_to": "tensorboard"}
    options |= {"pvla_plot_plans": True, "pvla_weight": 0.0001, "learning_rate": 0.0}
    trainer = trainer_of(case, case.model(), tmp_path, data, data, processing_class=tokenizer(), **options)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "pvla_plans").iterdir()) == ["eval-step-1.png", "eval-step-2.png"]
    (folder,) = {path.parent for path in (tmp_path / "board").rglob("*events*")}
    board = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in board.Images("pvla/eval_plan")] == [1, 2]
    assert board.Images("pvla/eval_plan")[0].width > 200
    first = next(row for row in data if row.get("video_token_mask", torch.ones(1)).any())
    plan, labels, _ = drawn.plans[0]
    torch.testing.assert_close(plan, found(case, [first])[1][0][0], rtol=1e-3, atol=1e-5)
    valid = first["attention_mask"].bool()
    text = first.get("text_token_mask", first["input_ids"] != VISUAL if name == "image placeholders" else valid).bool()
    assert labels == [f"w{token}" for token in first["input_ids"][valid & text].tolist()]


def test_pictures_without_anything_to_show(tmp_path, monkeypatch):
    """No words to name, an evaluation before training; no video at all."""
    drawn = Drawn(monkeypatch)
    trainer = trainer_of(TEXT, TEXT.model(), tmp_path, processing_class=tokenizer(), pvla_plot_plans=True)
    trainer.evaluate()
    assert drawn.plans[0][1] is None
    assert [path.name for path in (tmp_path / "pvla_plans").iterdir()] == ["eval-step-0.png"]
    trainer.evaluate([example | {"video_token_mask": places()} for example in marked()])
    assert len(drawn.plans) == 1


@pytest.mark.parametrize("name", ["text encoder", "all blocks", "image placeholders"])
def test_plans_of_a_data_set(name, tmp_path):
    """One for each sample, as found sample by sample, with the names of its words; none without PVLA."""
    case = CASES[name]
    data = case.data()[:5] if name == "image placeholders" else marked(5, embedded=False)
    trainer = trainer_of(case, case.model().eval(), tmp_path, data, batch=2, processing_class=tokenizer())
    plans = trainer.transport_plans(data)
    for found_plan, (expected, _) in zip(plans, found(case, data)[1][:5], strict=True):
        torch.testing.assert_close(found_plan.plan, expected, rtol=1e-3, atol=1e-5)
        assert len(found_plan.words) == expected.shape[1]
    with pytest.raises(ValueError, match="pvla_weight"):
        trainer_of(case, case.model(), tmp_path, data, pvla_weight=0.0).transport_plans(data)
