"""States as they enter the blocks: projected video tokens against words, in every kind of model; what is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from alignment import CASES, Case, step_by_hand, steps_logged, trainer_of, weights
from alignment_batches import generated, marked, pictured
from alignment_inputs import MODELS, Tokens, grounding, of_grounding, watched
from alignment_models import VISUAL, adapt, bart, bert, llava
from video_grounding.features import Collator

from peft_read import PvlaTrainingArguments, VideoTextStates
from peft_read.pvla.input_states import InputStates
from peft_read.pvla.tokens import TokenMasks


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_by_hand(name, tmp_path):
    """Losses, and all trained weights after a step; the alignment reaches what comes before the blocks only."""
    case, model = MODELS[name], MODELS[name].model()
    task, _, by_pot, after = step_by_hand(case, model, case.data(), 0.7)
    without = step_by_hand(case, model, case.data(), 0.0)[-1]
    trainer = trainer_of(case, model, tmp_path, pvla_weight=0.7, remove_unused_columns=name != "own model")
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log["task_loss"] == pytest.approx(float(task), abs=1e-5)
    assert log["pvla_loss"] == pytest.approx(by_pot, abs=1e-4)
    for parameter, value in weights(model).items():
        torch.testing.assert_close(value, after[parameter], rtol=1e-3, atol=1e-6)
    moved = {n for n in after if not torch.allclose(after[n], without[n], rtol=0, atol=1e-6)}
    assert moved
    assert not any(".read_" in parameter for parameter in moved)


def test_dual_encoders_are_compared_by_their_towers(tmp_path):
    """There the two haven't met in the towers' outputs, and there is nothing before them to align."""
    case = CASES["clip, patches"]
    logs = []
    for states in ("inputs", "towers"):
        trainer = trainer_of(case, case.model(), tmp_path, pvla_states=states)
        trainer.train()
        logs.append(steps_logged(trainer)[0]["pvla_loss"])
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (
            Case(lambda: grounding(["saliency_head"]), watched, None, collator=Collator(Tokens())),
            r"\['frame_projection'\]",
        ),
        (CASES["image placeholders"], r"\['multi_modal_projector'\]"),
        (CASES["video placeholders"], r"\['visual.merger'\]"),
        (Case(bert, marked, None), "the names of what makes the video tokens"),
        (Case(bart, generated, None, seq2seq=True), "the names of what makes the video tokens"),
    ],
    ids=["own model", "llava", "qwen2-vl", "frozen inputs", "encoder-decoder"],
)
def test_nothing_trained_before_the_blocks_is_refused(case, named, tmp_path):
    """When the Trainer is made, with what to train; also where checkpointing makes inputs need gradients."""
    with pytest.raises(ValueError, match=r"nothing that comes before is trained.*modules_to_save") as error:
        trainer_of(case, case.model(), tmp_path, pvla_states="inputs", remove_unused_columns=case.collator is None)
    assert error.match(named)
    model = case.model()
    model.get_base_model().enable_input_require_grads()
    with pytest.raises(ValueError, match="nothing that comes before is trained"):
        trainer_of(case, model, tmp_path, pvla_states="inputs", remove_unused_columns=case.collator is None)


@pytest.mark.parametrize("states", ["auto", "last_block", "all_blocks", "bottleneck"])
def test_negatives_of_block_states_are_refused(states, tmp_path):
    """With the reason, and what to do."""
    with pytest.raises(ValueError, match=r"haven't met.*copying it into the frames.*pvla_states='inputs'"):
        trainer_of(Case(bert, marked, None), bert(), tmp_path, pvla_negatives=True, pvla_states=states)


def test_negatives_of_a_function_are_refused_unless_it_says_that_they_have_not_met(tmp_path):
    """What isn't said isn't assumed."""

    def read(met):
        def states(model, batch, outputs):
            embedded = model.get_input_embeddings()(batch["input_ids"])
            return VideoTextStates(embedded[:, :3], embedded[:, 3:], met=met)

        return states

    def make(met):
        case = MODELS["trained embeddings"]
        own = Case(case.model, case.data, None, arguments={"pvla_states": read(met)})
        return trainer_of(own, own.model(), tmp_path, pvla_negatives=True, pvla_health_steps=1)

    with pytest.raises(ValueError, match=r"VideoTextStates\(\.\.\., met=False\)"):
        make(True).train()
    trainer = make(False)
    trainer.train()
    assert "pvla_gap" in steps_logged(trainer)[0]


def test_a_function_says_which_sentences_are_the_same(tmp_path):
    """Behind dropout states don't tell: a warning says what to give, and what says the same is no negative."""

    def read(ids):
        def states(model, batch, outputs):
            embedded = F.dropout(model.get_input_embeddings()(batch["input_ids"]), 0.5)
            words = batch["input_ids"][:, 3 : 3 + ids] if ids else None
            return VideoTextStates(embedded[:, :3], embedded[:, 3:], met=False, word_ids=words)

        return states

    def log(ids=None):
        case = MODELS["trained embeddings"]
        own = Case(case.model, lambda: [case.data()[0]] * 4, None, arguments={"pvla_states": read(ids)})
        trainer = trainer_of(own, own.model(), tmp_path, pvla_negatives=True, pvla_health_steps=1)
        trainer.train()
        return steps_logged(trainer)[0]

    with pytest.warns(UserWarning, match=r"same `input_ids`.*negatives.*word_ids"):
        assert log()["pvla_loss"] > 0.1
    words = len(MODELS["trained embeddings"].data()[0]["input_ids"]) - 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert log(words)["pvla_loss"] == 0
    with pytest.raises(ValueError, match=r"word_ids has shape \(4, 1\); the words have"):
        log(1)


@pytest.mark.parametrize("name", ["own model", "llava", "towers"])
def test_a_step_with_negatives(name, tmp_path):
    """The alignment is the contrast over the batch; it adds up, falls, and the gap grows."""
    case = CASES["siglip"] if name == "towers" else MODELS[name]
    options = {"pvla_negatives": True, "pvla_temperature": 0.3, "pvla_health_steps": 1, "num_train_epochs": 12}
    options |= {"optim": "adamw_torch", "learning_rate": 2e-2, "pvla_weight": 30.0}
    trainer = trainer_of(case, case.model(), tmp_path, remove_unused_columns=name != "own model", **options)
    trainer.train()
    logs = steps_logged(trainer)
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + 30 * log["pvla_loss"], rel=1e-5)
    assert logs[-1]["pvla_loss"] < logs[0]["pvla_loss"] - 0.1
    assert logs[-1]["pvla_gap"] > logs[0]["pvla_gap"] + 0.01
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_task_loss"] + 30 * metrics["eval_pvla_loss"], rel=1e-5)


def test_a_sentence_is_not_told_from_itself_under_dropout(tmp_path):
    """Its ids tell that it is the same, where dropout gives its words other states in each sample."""
    case = CASES["siglip"]
    said = {name: case.data()[0][name] for name in ("input_ids", "attention_mask")}
    data = [row | said for row in case.data()]
    model = adapt(case.model().unload(), dropout=0.5)
    trainer = trainer_of(case, model, tmp_path, data, pvla_negatives=True, pvla_health_steps=1)
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log["pvla_loss"] == 0
    assert "pvla_gap" not in log  # there is no other sentence


def test_ids_are_those_of_words_only_where_frames_come_behind_them():
    """Else the sequence's words lie elsewhere among the ids, and their states have to tell them."""
    source, ids = InputStates(grounding()), torch.arange(12).view(2, 6)

    def told(frames, text):
        video, words = (torch.tensor([[i in places for i in range(9)]] * 2) for places in (frames, text))
        return source.words({"input_ids": ids, "video_token_mask": video, "text_token_mask": words})

    found, mask = told((6, 7, 8), (1, 2))
    assert torch.equal(found, ids)
    assert mask.tolist() == [[False, True, True, False, False, False]] * 2
    assert told((0, 1, 2), (3, 4)) is None
    assert told((6, 7), (1, 8)) is None


def test_negatives_need_a_batch(tmp_path):
    """Of one sample on one device there are none."""
    with pytest.raises(ValueError, match="raise per_device_train_batch_size"):
        trainer_of(MODELS["own model"], grounding(), tmp_path, batch=1, pvla_negatives=True)
    case = CASES["siglip"]
    one = {"pvla_negatives": True, "per_device_eval_batch_size": 1}
    with pytest.raises(ValueError, match="a batch has one: raise per_device_eval_batch_size"):
        trainer_of(case, case.model(), tmp_path, evaluate=case.data(), **one)
    trainer = trainer_of(case, case.model(), tmp_path, pvla_negatives=True)
    trainer.args.per_device_eval_batch_size = 1
    with pytest.raises(ValueError, match="a batch has one: raise per_device_eval_batch_size"):
        trainer.evaluate(case.data())
    with pytest.raises(ValueError, match="temperature=0"):
        PvlaTrainingArguments(str(tmp_path), use_cpu=True, pvla_temperature=0.0)


def test_evaluation_with_negatives_is_the_mean_over_those_that_have_some(tmp_path):
    """A last batch of one says nothing; one of three counts as three; all of one sentence are 0."""
    case, data = CASES["siglip"], CASES["siglip"].data()
    model = case.model()

    def evaluated(data, batch):
        options = {"pvla_negatives": True, "per_device_eval_batch_size": batch, "pvla_weight": 0.7}
        metrics = trainer_of(case, model, tmp_path, evaluate=data, **options).evaluate()
        whole = metrics["eval_task_loss"] + 0.7 * metrics["eval_pvla_loss"]
        assert metrics["eval_loss"] == pytest.approx(whole, rel=1e-6)
        return metrics["eval_pvla_loss"]

    four, two, three = evaluated(data[:4], 4), evaluated(data[4:6], 2), evaluated(data[4:7], 3)
    assert four > 0.5
    assert evaluated(data[:5], 4) == pytest.approx(four, rel=1e-5)
    assert evaluated(data[:6], 4) == pytest.approx((4 * four + 2 * two) / 6, rel=1e-5)
    assert evaluated(data[:7], 4) == pytest.approx((4 * four + 3 * three) / 7, rel=1e-5)
    said = {name: data[0][name] for name in ("input_ids", "attention_mask")}
    same = [row | said for row in data[:4]]
    assert evaluated(same, 4) == 0
    assert evaluated(data[:4] + same, 4) == pytest.approx(four, rel=1e-5)


def test_a_share_of_the_gradient_is_measured_where_both_losses_reach(tmp_path):
    """The projection's weights: READ's come after what is aligned."""
    case, model = MODELS["own model"], grounding()
    batch = case.collator(watched())
    base = model.train().get_base_model()
    outputs = model(**{n: v for n, v in batch.items() if "token_mask" not in n})
    losses = outputs.loss, torch.stack([_distance(*pair) for pair in of_grounding(model, batch, outputs, {})]).mean()
    projection = list(base.frame_projection.modules_to_save.parameters())
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, projection, retain_graph=True)]) for loss in losses
    ]
    share = {"pvla_gradient_share": 0.2, "pvla_health_steps": 1}
    trainer = trainer_of(case, model, tmp_path, remove_unused_columns=False, **share)
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log["pvla_weight"] == pytest.approx(float(0.2 * norms[0].norm() / norms[1].norm()), rel=1e-3)
    assert log["pvla_gradient_share"] == pytest.approx(0.2, rel=1e-3)


def _distance(video, text):
    from alignment import ITERATIONS, REG

    from peft_read import PvlaLoss

    return PvlaLoss(reg=REG, n_iter=ITERATIONS)(video[None], text[None])


@pytest.mark.parametrize("name", ["own model", "llava", "towers"])
def test_words_that_count(name, tmp_path):
    """`text_token_mask` as weights: in the loss, through the Trainer, for masks, placeholders and towers."""
    case = CASES["siglip"] if name == "towers" else MODELS[name]
    collate = case.collator or _stack

    def weighted(examples):
        batch = collate(examples)
        length = (batch["text_token_mask"] if name == "own model" else batch["input_ids"]).shape[1]
        share = torch.tensor([1.0, 0.5, 0.0, 0.25]).repeat(length)[:length]
        known = batch.get("text_token_mask", torch.ones(len(batch["input_ids"]), length))
        return batch | {"text_token_mask": known * share}

    own = Case(case.model, case.data, case.compared, collator=weighted, options=case.options)
    model = case.model()
    trainer = trainer_of(own, model, tmp_path, learning_rate=0.0, remove_unused_columns=name != "own model")
    trainer.train()
    plain = trainer_of(case, model, tmp_path, learning_rate=0.0, remove_unused_columns=name != "own model")
    plain.train()
    found, without = (steps_logged(t)[0]["pvla_loss"] for t in (trainer, plain))
    assert found > 0
    assert found != pytest.approx(without, abs=1e-4)
    plans = trainer.transport_plans(case.data()[:2])
    assert all(torch.isfinite(plan.plan).all() for plan in plans)
    if name == "own model":
        batch = weighted(watched())
        base = model.get_base_model()
        video = base.frame_projection(batch["frame_features"])
        text = base.text_model.get_input_embeddings()(batch["input_ids"])
        from alignment import ITERATIONS, REG

        from peft_read import PvlaLoss

        mask = batch["text_token_mask"][:, : text.shape[1]]
        expected = PvlaLoss(reg=REG, n_iter=ITERATIONS)(video, text, batch["frame_mask"], mask)
        assert found == pytest.approx(float(expected.detach()), abs=1e-5)


def test_a_placeholder_is_no_word():
    """Weights that a user gives to every token, such as 1 where nothing else is known, leave video video."""
    masks, batch = TokenMasks(llava()), _stack(pictured())
    video, text = masks(batch | {"text_token_mask": torch.full(batch["input_ids"].shape, 0.5)})
    assert torch.equal(video, batch["input_ids"] == VISUAL)
    assert torch.equal(text > 0, masks(batch)[1])
    assert set(text.unique().tolist()) == {0.0, 0.5}


def _stack(examples):
    return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in examples[0]}
