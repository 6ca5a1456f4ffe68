"""Words that are words, and frames that are frames: which tokens of a sequence PVLA compares."""

import logging

import pytest
import torch
from alignment import CASES, Case, first_tokens, step_by_hand, steps_logged, trainer_of, weights
from alignment_batches import filmed, generated, joined, marked, places, random, words
from alignment_models import VIDEO, bart, bert, qwen2_vl
from models import PATCH
from vlm_models import IDS, SPECIAL, chat, tokenizer

from peft_read import PvlaTrainingArguments
from peft_read.pvla.frames import frame_numbers, pooled_by_frame
from peft_read.pvla.tokens import TokenMasks
from peft_read.pvla.words import TemplateTokens, choose_words


QUESTION, ANSWER = "what happens in the video?", "the red square moves"
ROLES = "{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
TEMPLATES = {
    "chatml": chat("<video>"),
    "chatml, told who it is": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + chat("<video>"),
    "roles without special tokens": (
        "{% for m in messages %}" + ROLES + "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in "
        "m['content'] %}{{ '<video>' if c['type'] == 'video' else c['text'] }}{% endfor %}{% endif %}"
        "{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    ),
    "another one for videos": (
        "{% set ns = namespace(seen=false) %}{% for m in messages %}{% for c in m['content'] if c is mapping and "
        "c['type'] == 'video' %}{% set ns.seen = true %}{% endfor %}{% endfor %}{% for m in messages %}"
        "{{ '<|im_start|>User' if ns.seen else '<s>user ' }}{% for c in m['content'] if c is mapping %}"
        "{{ '<video>' if c['type'] == 'video' else c['text'] }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    ),
}


def conversation():
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
    return [asked, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]


def batch_of(processing):
    """Two conversations of other lengths, padded, with labels on the answer and what the template puts behind it."""
    rendered = processing.apply_chat_template(conversation(), tokenize=False)
    longer = rendered.replace(QUESTION, f"{QUESTION} {QUESTION}")
    encoded = processing([rendered, longer], padding=True, add_special_tokens=False, return_offsets_mapping=True)
    batch = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, text in enumerate((rendered, longer)):
        learnt = torch.tensor(encoded["offset_mapping"][row])[:, 1] > text.rfind(ANSWER)
        batch["labels"][row, learnt] = batch["input_ids"][row, learnt]
    return batch


class Masks(TokenMasks):
    """Without a model."""

    def __init__(self, chosen, template):
        self.placeholders, self.chosen, self.template = [IDS["<video>"]], chosen, template


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("chosen", "said"), [("all", QUESTION + ANSWER), ("answer", ANSWER), ("prompt", QUESTION)], ids=lambda v: v[:6]
)
def test_template_and_special_tokens_are_no_words(name, chosen, said):
    """Of a conversation the words of question and answer alone, in a padded batch too."""
    processing = tokenizer()
    processing.chat_template = TEMPLATES[name]
    batch = batch_of(processing)
    video, text = Masks(chosen, TemplateTokens.of(processing))(batch)
    assert video.sum(1).tolist() == [1, 1]
    decoded = processing.decode(batch["input_ids"][0][text[0] > 0])
    assert decoded.replace(" ", "") == said.replace(" ", "")
    assert int((text[1] > 0).sum()) >= int((text[0] > 0).sum())


def test_without_a_template_special_tokens_alone_are_left_out():
    """And of what is no tokenizer nothing is known."""
    processing = tokenizer()
    template = TemplateTokens.of(processing)
    assert set(template.special) == set(range(len(SPECIAL)))
    assert template.runs == ()
    assert TemplateTokens.of(None) == TemplateTokens.of(object()) == TemplateTokens()


def test_what_a_mask_marks_counts():
    """The collator's own word is not looked through again, but for labels, padding and video."""
    processing = tokenizer()
    processing.chat_template = TEMPLATES["chatml"]
    batch = batch_of(processing)
    batch["text_token_mask"] = torch.ones_like(batch["input_ids"], dtype=torch.float) * 0.5
    video, text = Masks("all", TemplateTokens.of(processing))(batch)
    assert video.any()
    assert torch.equal(text, 0.5 * batch["attention_mask"] * ~video)
    _, text = Masks("answer", TemplateTokens.of(processing))(batch)
    assert torch.equal(text > 0, batch["labels"] != -100)


def test_labels_that_are_not_over_the_tokens_are_refused(tmp_path):
    """Those of a class or of a decoder tell no words of the encoder; before training."""
    text = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"pvla_words='answer'.*shape \(2, 5\).*labels of shape \(2, 3\)"):
        choose_words(text, {"labels": torch.zeros(2, 3)}, "answer")
    with pytest.raises(ValueError, match="the batch has none"):
        choose_words(text, {}, "prompt")
    for case in (Case(bert, marked, None), Case(bart, generated, None, seq2seq=True)):
        with pytest.raises(ValueError, match=r"pvla_words='answer' tells words by `labels`.*pvla_words='all'"):
            trainer_of(case, case.model(), tmp_path, pvla_words="answer")


@pytest.mark.parametrize("options", [{"pvla_words": "answer"}, {"pvla_pool_frames": True}], ids=lambda o: min(o))
def test_states_that_are_no_sequence_are_refused(options, tmp_path):
    """A function of one's own and two towers give frames and words themselves."""
    cases = (CASES["siglip"], Case(bart, generated, None, seq2seq=True, arguments={"pvla_states": first_tokens}))
    for case in cases:
        with pytest.raises(ValueError, match="pvla_words and pvla_pool_frames are for"):
            trainer_of(case, case.model(), tmp_path, **options)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match=r"pvla_words='answers': expected one of 'all', 'answer', 'prompt'"):
        PvlaTrainingArguments("out", pvla_words="answers")


def wide(rows=8):
    """Of Qwen2-VL: videos of two frames, two tokens each, and text of which the end is learnt."""
    data = []
    for row, example in enumerate(filmed(rows)):
        ids = words(row)
        ids[1:5] = VIDEO
        learnt = places((6 + row % 3, 10)).bool()
        example |= {"input_ids": ids, "labels": torch.where(learnt, ids, -100)}
        example |= {"pixel_values_videos": random(16, 3 * 2 * PATCH**2, seed=row)}
        data.append(
            example | {"video_grid_thw": torch.tensor([2, 2, 4]), "mm_token_type_ids": 2 * (ids == VIDEO).long()}
        )
    return data


LAYER = "base_model.model.model.language_model.layers.1"


def compared(pool, learnt):
    """By hand: the two frames' means, or all four tokens, against the words with a label or without."""

    def pairs(model, batch, outputs, heard):
        found = []
        for states, ids, labels in zip(heard[LAYER], batch["input_ids"], batch["labels"], strict=True):
            video = torch.stack([states[1:3].mean(0), states[3:5].mean(0)]) if pool else states[1:5]
            kept = {"all": labels == labels, "answer": labels != -100, "prompt": labels == -100}[learnt]
            found.append((video, states[kept & (ids != VIDEO)]))
        return found

    return pairs


@pytest.mark.parametrize(("pool", "learnt"), [(True, "all"), (False, "answer"), (True, "prompt")])
def test_a_step_is_one_by_hand(pool, learnt, tmp_path):
    """Losses and weights after a step, and how many frames and words are logged."""
    case = Case(qwen2_vl, wide, compared(pool, learnt), (LAYER,), collator=joined)
    model = case.model()
    task, _, by_pot, after = step_by_hand(case, model, wide(), 0.7)
    options = {"pvla_words": learnt, "pvla_pool_frames": pool, "pvla_health_steps": 1}
    trainer = trainer_of(case, model, tmp_path, pvla_weight=0.7, **options)
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log["task_loss"] == pytest.approx(float(task), abs=1e-5)
    assert log["pvla_loss"] == pytest.approx(by_pot, abs=1e-4)
    assert log["pvla_frames"] == (2 if pool else 4)
    labelled = sum(int((example["labels"] != -100).sum()) for example in wide()) / 8
    assert log["pvla_words"] == pytest.approx({"all": 6, "answer": labelled, "prompt": 6 - labelled}[learnt])
    for parameter, value in weights(model).items():
        torch.testing.assert_close(value, after[parameter], rtol=1e-3, atol=1e-6)


def test_what_is_taken_for_video_is_logged(tmp_path, caplog):
    """When the Trainer is made: the ids, and how many tokens each side has."""
    case = Case(qwen2_vl, wide, None, collator=joined)
    with caplog.at_level(logging.INFO, logger="peft_read"):
        trainer_of(case, case.model(), tmp_path, pvla_words="answer")
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("peft_read.pvla")]
    assert str(VIDEO) in told
    assert "4 video tokens and 4 words among 10 tokens" in told


def rows_of(*texts):
    """`v` is a video token, anything else is text."""
    return torch.tensor([[char == "v" for char in text] for text in texts])


def grid(*sizes):
    return torch.tensor(sizes)


# Rows of tokens, what else the batch holds, and each token's frame.
FRAMES = {
    "runs": (("vv.vv.", ".v.vvv"), {}, ["00.11.", ".0.111"]),
    "runs that a grid counts": (("vv.vv.", "..vv.."), {"video_grid_thw": grid((2, 2, 4), (1, 2, 4))}, None),
    "grid": (("vvvv..", ".vvvvv", "......"), {"video_grid_thw": grid((2, 2, 4), (5, 2, 2))}, ["0011..", ".01234"]),
    "two videos in a row": (("vv.vvv",), {"video_grid_thw": grid((2, 2, 2), (3, 2, 2))}, ["01.234"]),
    "images": (("vv..v.", "v.vv.."), {"image_grid_thw": grid(*[(1, 2, 4)] * 4)}, ["00..1.", "0.11.."]),
    "one image each": (("vv....", ".vv..."), {"image_grid_thw": grid((1, 2, 4), (1, 2, 4))}, ["00....", ".00..."]),
    "images beside videos, a run each": (
        ("vv.v.v", "v...v."),
        {"image_grid_thw": grid((1, 2, 4), (1, 2, 2)), "video_grid_thw": grid((2, 2, 2), (1, 2, 2))},
        ["00.1.2", "0...1."],
    ),
    "pixels": (("vvvv..", "..vvvv"), {"pixel_values_videos": torch.zeros(2, 2, 3, 4, 4)}, ["0011..", "..0011"]),
    "a token at the end": (("vvvvv.",), {"pixel_values_videos": torch.zeros(1, 2, 3, 4, 4)}, ["00111."]),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_of_tokens(name):
    """In a batch as alone."""
    texts, batch, expected = FRAMES[name]
    expected = expected or ["00.11.", "..00.."]
    found = frame_numbers(rows_of(*texts), batch)
    for row, numbers in zip(found.tolist(), expected, strict=False):
        assert "".join("." if number < 0 else str(number) for number in row) == numbers
    assert (found[len(expected) :] == -1).all()


@pytest.mark.parametrize(
    ("texts", "batch"),
    [
        (("vvvv..", "..vv.."), {}),
        (("vvvv.v",), {"video_grid_thw": grid((2, 2, 4)), "image_grid_thw": grid((1, 2, 2))}),
        (("vvv.vv",), {"video_grid_thw": grid((2, 2, 4), (2, 2, 2))}),
        (("vvvv.v",), {"pixel_values_videos": torch.zeros(1, 2, 3, 4, 4), "pixel_values": torch.zeros(1, 3, 4, 4)}),
        (("vvvvvv",), {"video_grid_thw": grid((2, 2, 4), (1, 2, 4))}),
    ],
    ids=[
        "nothing tells",
        "an image beside a video",
        "another number of tokens",
        "an image, pixels",
        "no text between",
    ],
)
def test_frames_that_can_not_be_told_are_refused(texts, batch):
    with pytest.raises(ValueError, match=r"pvla_pool_frames=True can't tell the frames"):
        frame_numbers(rows_of(*texts), batch)


def test_means_of_frames():
    """Of each block, in float32 at least, in a batch as alone."""
    numbers = frame_numbers(rows_of("vv.v", ".v.."), {})
    states = [torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    pooled, mask = pooled_by_frame(states, numbers)
    assert mask.tolist() == [[True, True], [True, False]] * 2
    for block, x in enumerate(states):
        torch.testing.assert_close(pooled[2 * block], torch.stack([x[0, :2].mean(0), x[0, 3]]))
        torch.testing.assert_close(pooled[2 * block + 1, 0], x[1, 1])
    half, _ = pooled_by_frame([states[0].half()], numbers)
    assert half.dtype == torch.float32
