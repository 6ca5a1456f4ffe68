"""Models and batches that aren't as PVLA usually meets them: the right alignment, or a refusal that says why."""

import copy

import pytest
import torch
from alignment import CASES, ITERATIONS, REG, Case, alignment, collate, steps_logged, trainer_of
from alignment_batches import pictured, places, random, some_pictured, told, words
from alignment_inputs import MODELS, grounding, watched
from alignment_models import adapt
from alignment_own import HasPrefix, ProjectsWords, PutsVideoIn, TakesMask, adapted
from datasets import Dataset, DatasetDict
from test_pvla_pairs import captioned_videos, trainer_with_pairs
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Trainer, TrainingArguments
from vlm_models import IDS, PATCH, base_model

from peft_read import PvlaLoss, VideoTextStates
from peft_read.pvla.source import check_token_mask


OWN = MODELS["own model"]
LOSS = PvlaLoss(reg=REG, n_iter=ITERATIONS)


def logged(case, model, folder, **options):
    trainer = trainer_of(case, model, folder, **options)
    trainer.train()
    return steps_logged(trainer)


def case_of(cls, **options):
    return Case(None, cls.data, None, options={"pvla_states": "inputs"} | options)


def with_collator(change, case=OWN):
    """A case whose batches are changed."""
    changed = copy.copy(case)
    changed.collator = lambda examples: change(case.collator(examples))
    return changed


@pytest.mark.parametrize("saved", [["project", "head"], ["project", "head", "embed_tokens"]])
def test_a_class_that_puts_the_video_among_the_words(saved, tmp_path):
    """What enters the first block has the projected frames; what the embeddings gave has placeholders."""
    model = adapted(PutsVideoIn, saved)
    case = case_of(PutsVideoIn)
    expected = LOSS(*model.get_base_model().by_hand(collate(case, PutsVideoIn.data())))
    assert logged(case, model, tmp_path, learning_rate=0.0)[0]["pvla_loss"] == pytest.approx(expected.item(), abs=1e-5)
    late = adapted(PutsVideoIn, saved, target_modules=r".*encoder\.layer\.1\.output\.dense")
    found = logged(case, late, tmp_path, learning_rate=0.0)[0]["pvla_loss"]
    expected = LOSS(*late.get_base_model().by_hand(collate(case, PutsVideoIn.data())))
    assert found == pytest.approx(expected.item(), abs=1e-5)


def test_kosmos(tmp_path):
    """Its text tower puts the pictures in."""
    small = {"embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4, "vocab_size": 50}
    small |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Kosmos2Config(
        text_config=small, vision_config=vision | {"image_size": 8, "patch_size": 4}, latent_query_num=4
    )
    torch.manual_seed(0)
    targets = r".*text_model.*layers\.\d+\.ffn\.fc2"
    model = adapt(
        Kosmos2ForConditionalGeneration(config), modules_to_save=["image_to_text_projection"], target_modules=targets
    )

    def data(rows=8):
        masks = {"image_embeds_position_mask": places((1, 5)), "video_token_mask": places((1, 5))}
        masks |= {"text_token_mask": places((5, 10)), "attention_mask": places((0, 10))}
        return [
            {"input_ids": words(r), "labels": words(r), "pixel_values": random(3, 8, 8, seed=r), **masks}
            for r in range(rows)
        ]

    case = Case(None, data, None, options={"pvla_states": "inputs"})
    entered = {}
    block = model.get_base_model().text_model.model.layers[0]
    block.register_forward_pre_hook(lambda _, args, kwargs: entered.update(x=args[0]), with_kwargs=True)
    (log,) = logged(case, model, tmp_path, learning_rate=0.0, evaluate=[])
    batch = collate(case, data())
    model.train()(**{name: value for name, value in batch.items() if "token_mask" not in name})
    expected = LOSS(entered["x"][:, 1:5], entered["x"][:, 5:])
    assert log["pvla_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("saved", [["project", "words", "head"], ["words", "head"]])
def test_what_is_trained_behind_words_learns(saved, tmp_path):
    """Frozen embeddings may have a trained module behind them."""
    model = adapted(ProjectsWords, saved)
    case = case_of(ProjectsWords)
    batch = collate(case, ProjectsWords.data())
    task = model(**{name: value for name, value in batch.items() if "token_mask" not in name})["loss"]
    aligned = LOSS(*model.get_base_model().by_hand(batch))
    weight = model.get_base_model().words.modules_to_save.default.weight
    (gradient,) = torch.autograd.grad(task + 5 * aligned, weight)
    before = weight.detach().clone()
    logged(case, model, tmp_path, pvla_weight=5.0, learning_rate=0.1)
    torch.testing.assert_close((before - weight) / 0.1, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_a_model_gets_the_masks_that_it_names(weight, tmp_path):
    """As transformers' Trainer gives them, in training and in evaluation."""
    case = Case(None, TakesMask.data, None)
    model = adapted(TakesMask, ["kind", "head"])
    arguments = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "use_cpu": True, "max_steps": 1}
    arguments |= {"learning_rate": 0.0, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    plain = Trainer(
        model,
        TrainingArguments(str(tmp_path), **arguments, disable_tqdm=True),
        train_dataset=TakesMask.data(),
        eval_dataset=TakesMask.data(),
    )
    plain.train()
    expected = plain.state.log_history[0]["loss"]
    trainer = trainer_of(case, model, tmp_path, learning_rate=0.0, pvla_weight=weight)
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log.get("task_loss", log["loss"]) == pytest.approx(expected, abs=1e-6)
    found = trainer.evaluate()
    assert found.get("eval_task_loss", found["eval_loss"]) == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
    assert found.get("eval_pvla_loss") == pytest.approx(log.get("pvla_loss"), abs=1e-6)


def test_something_before_the_words(tmp_path):
    """Then words aren't where their ids are, and sentences that differ are negatives."""
    model = adapted(HasPrefix, ["project", "head"])
    case = case_of(HasPrefix)
    by_hand = model.get_base_model().by_hand(collate(case, HasPrefix.data()))
    expected = PvlaLoss(reg=REG, n_iter=ITERATIONS, negatives=True)(*by_hand).item()
    (log,) = logged(case, model, tmp_path, batch=4, pvla_negatives=True, learning_rate=0.0, evaluate=[])
    assert expected > 1
    assert log["pvla_loss"] == pytest.approx(expected, abs=1e-5)


def test_the_share_is_of_the_whole_step(tmp_path):
    """The weight of pairs is the same however many batches make a step."""
    weights = []
    for accumulated in (1, 4):
        options = {"batch": 8 // accumulated, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        options |= {"pvla_pairs_batch_size": 5, "pvla_gradient_share": 0.2, "learning_rate": 0.0}
        trainer = trainer_with_pairs(tmp_path, model=grounding(), train=watched(1) * 8, **options)
        trainer.train()
        weights.append(steps_logged(trainer)[0]["pvla_weight"])
    assert weights[1] == pytest.approx(weights[0], rel=1e-3)


def test_a_batch_without_video(tmp_path):
    """It counts in the task alone, also where its batch is the step's only one, or its samples are the negatives."""
    data = [pictured(8)[row] if row < 4 else example for row, example in enumerate(told(8))]
    case = copy.copy(MODELS["llava"])
    case.collator = some_pictured
    for options in ({}, {"pvla_negatives": True}, {"pvla_gradient_share": 0.1, "pvla_health_steps": 1}):
        model = case.model()
        logs = logged(case, model, tmp_path, train=data, batch=4, evaluate=[], remove_unused_columns=False, **options)
        assert [log["pvla_loss"] > 0 for log in logs] == [True, False]
        assert logs[1]["loss"] == pytest.approx(logs[1]["task_loss"])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("text_token_mask", [1, -100, 1], "0 in padding.*Weights of words are floating-point"),
        ("text_token_mask", [1, 4, 1], "Weights of words are floating-point"),
        ("text_token_mask", [1.0, float("nan"), 1.0], "NaN"),
        ("text_token_mask", [1.0, -0.5, 1.0], "negative"),
        ("video_token_mask", [1, 2, 0], "other than 0 and 1"),
        ("video_token_mask", [1.0, 0.5, 0.0], "other than 0 and 1"),
    ],
)
def test_values_of_masks(name, values, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        check_token_mask(name, torch.tensor([values]))


def test_values_of_masks_in_training(tmp_path):
    """Before it, and in the loss."""

    def padded_otherwise(batch):
        return batch | {"text_token_mask": torch.where(batch["text_token_mask"].bool(), 1, -100)}

    with pytest.raises(ValueError, match="text_token_mask"):
        trainer_of(with_collator(padded_otherwise), grounding(), tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match="integers other than 0 and 1"):
        LOSS(random(1, 3, 4), random(1, 3, 4), word_mask=torch.tensor([[3, 1, 1]]))


def test_words_that_nothing_tells(tmp_path):
    """The mask of the ids isn't over the sequence: without one of words, padding would be words."""

    def without_words(batch):
        return {name: value for name, value in batch.items() if name != "text_token_mask"}

    with pytest.raises(
        ValueError,
        match=r"nothing tells words from padding.*Let the collator give 'text_token_mask'",
    ):
        trainer_of(with_collator(without_words), grounding(), tmp_path, remove_unused_columns=False)


def pictures_of_layers(rows=6):
    """For Qwen3-VL, whose vision tower gives states for several layers."""
    image = IDS["<|image_pad|>"]
    data = []
    for row in range(rows):
        ids = words(row) + 100
        ids[1], ids[2:6], ids[6] = IDS["<|vision_start|>"], image, IDS["<|vision_end|>"]
        shown = {"pixel_values": random(16, 6 * PATCH**2, seed=row), "image_grid_thw": torch.tensor([1, 4, 4])}
        data.append(
            {"input_ids": ids, "attention_mask": places((0, 10)), "labels": ids.where(ids != image, -100)} | shown
        )
        data[-1]["mm_token_type_ids"] = (ids == image).long()
    return data


def of_layers(examples):
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return batch | {"pixel_values": batch["pixel_values"].flatten(0, 1)}


def test_there_is_no_gap_where_the_tower_is_given_more_than_embeddings(tmp_path):
    """Another sample's picture can't be put in the place of the own one in states of several layers."""
    torch.manual_seed(0)
    model = adapt(base_model("qwen3_vl"), target_modules=r".*language_model\.layers\.\d+\.mlp\.down_proj")
    case = Case(None, pictures_of_layers, None, collator=of_layers)
    (log,) = logged(case, model, tmp_path, batch=6, pvla_health_steps=1, evaluate=[], remove_unused_columns=False)
    assert "pvla_residual" in log
    assert "pvla_gap" not in log


def test_the_gap_is_of_sentences_that_differ(tmp_path):
    """Another sample that says the same is no mismatch."""
    data = watched(8)
    for first, second in zip(data[::2], data[1::2], strict=True):
        second |= {name: first[name] for name in ("input_ids", "word_mask")}
    model = grounding()
    case = with_collator(lambda batch: batch)
    (log,) = logged(
        case, model, tmp_path, train=data, pvla_health_steps=1, learning_rate=0.0, remove_unused_columns=False
    )
    base, batch = model.get_base_model(), OWN.collator(data)
    frames = base.frame_projection(batch["frame_features"])
    said = base.text_model.get_input_embeddings()(batch["input_ids"])
    gaps = []
    for own in range(0, 8, 2):  # the one before says something else
        video = frames[own][batch["frame_mask"][own]]
        near, far = (said[i][batch["text_token_mask"][i][: said.shape[1]].bool()] for i in (own, own - 1))
        gaps.append((LOSS(video[None], far[None]) - LOSS(video[None], near[None])).item())
    assert log["pvla_gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


def test_a_batch_size_that_comes_down_to_one(tmp_path):
    """Where memory leaves one sample a batch, there is nothing to tell it from."""

    def collator(examples):
        if len(examples) > 1:
            raise RuntimeError("CUDA out of memory.")
        return OWN.collator(examples)

    case = copy.copy(OWN)
    case.collator = collator
    trainer = trainer_of(
        case, grounding(), tmp_path, batch=2, evaluate=[], pvla_negatives=True, auto_find_batch_size=True,
        remove_unused_columns=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="auto_find_batch_size came down to it"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_reentrant_checkpoints(tmp_path):
    """They let no gradient be measured: the figures of health come without it, and a share says what to set."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    options |= {"pvla_health_steps": 1, "evaluate": [], "remove_unused_columns": False}
    (log,) = logged(OWN, grounding(), tmp_path, **options)
    assert "pvla_gap" in log
    assert "pvla_gradient_share" not in log
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        logged(OWN, grounding(), tmp_path, pvla_gradient_share=0.1, **options)


def test_pairs_that_are_no_data_set(tmp_path):
    """Splits by name; words by labels that pairs don't have."""
    split = Dataset.from_list([{"input_ids": [1, 2]}] * 4)
    for splits in (DatasetDict(train=split), {"train": captioned_videos()}):
        with pytest.raises(ValueError, match=r"pairs_dataset is a .* with 'train': give one split of it"):
            trainer_with_pairs(tmp_path, splits)
    with pytest.raises(ValueError, match=r"pvla_words='answer' tells words by labels, and pairs have none"):
        trainer_with_pairs(tmp_path, pvla_words="answer")


def test_a_dual_encoders_texts_padded_without_a_mask(tmp_path):
    """SigLIP's processor fills up with the token that ends a text, and gives no mask."""
    case = CASES["siglip"]
    model = case.model()
    pad = model.get_base_model().config.text_config.pad_token_id
    masked = [example | {"input_ids": example["input_ids"].clone()} for example in case.data()]
    for example in masked:
        example["input_ids"][~example["attention_mask"].bool()] = pad
    bare = [{n: v for n, v in example.items() if n != "attention_mask"} for example in masked]
    outputs = model.eval()(**{name: value for name, value in collate(case, bare).items() if "token_mask" not in name})
    expected = alignment(case.compared(model, collate(case, masked), outputs, {}))
    trainer = trainer_of(case, model, tmp_path, train=bare, evaluate=bare, learning_rate=0.0)
    assert trainer.evaluate()["eval_pvla_loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_masks_of_pairs_of_tokens(tmp_path):
    """The placeholders tell the video; which text is valid a mask of four dimensions doesn't say here."""
    case = MODELS["llava"]
    whole = torch.ones(1, 10, 10, dtype=torch.bool)
    data = [example | {"attention_mask": whole} for example in pictured(4)]
    assert logged(case, case.model(), tmp_path, train=data, batch=4, evaluate=[])[0]["pvla_loss"] > 0


def test_a_first_example_without_video(tmp_path):
    """It doesn't say that nothing is trained."""
    case = copy.copy(MODELS["llava"])
    case.collator = some_pictured
    data = [*told(2), *pictured(2)]
    logs = logged(case, case.model(), tmp_path, train=data, batch=2, evaluate=[], remove_unused_columns=False)
    assert [log["pvla_loss"] > 0 for log in logs] == [False, True]


def test_words_of_a_function_in_bfloat16(tmp_path):
    """Sentences of the same ids are looked at in float32."""

    def states(model, batch, outputs):
        embedded = model.get_input_embeddings()(batch["input_ids"]).bfloat16()
        return VideoTextStates(embedded[:, :3], embedded[:, 3:], met=False)

    case = MODELS["trained embeddings"]
    own = Case(None, lambda: [case.data()[0]] * 4, None, arguments={"pvla_states": states})
    (log,) = logged(own, case.model(), tmp_path, pvla_negatives=True, pvla_health_steps=1)
    assert log["pvla_loss"] == 0
