"""What the example for video language models reads: lines of data, windows in answers, options, frames of videos."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_files import turned, write
from vlm_models import write_data, write_video

from peft_read import PvlaSeq2SeqTrainingArguments


pytest.importorskip("rouge_score")
pytest.importorskip("yaml")

from vlm import digits
from vlm.data import ANSWER, read_samples, say_windows
from vlm.frames import decode_frames
from vlm.metrics import choose_metric, parse_windows, score
from vlm.options import command_line, parse_options


USER = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens?"}]}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "it "}, {"type": "text", "text": "moves"}]}


@pytest.fixture
def lines(tmp_path):
    """Writes a folder whose every line is the given one, and reads it."""

    def read(line, **options):
        write_data(tmp_path / "data", [line] * 6)
        return read_samples(tmp_path / "data", **options)

    return read


@pytest.mark.parametrize(
    ("line", "question", "answer"),
    [
        (
            {"query": "it moves", "relevant_windows": [[3, 7.5]]},
            "At which seconds does the video show this: it moves?",
            "from 3.0 to 7.5 seconds",
        ),
        ({"question": "why?", "answer": "so"}, "why?", "so"),
        ({"caption": "it moves"}, "Describe what happens in the video.", "it moves"),
        ({"messages": [{"role": "system", "content": "be short"}, USER, SAID]}, "what happens?", "it moves"),
    ],
    ids=["query", "question", "caption", "messages"],
)
def test_lines(lines, line, question, answer):
    """Question and answer of each kind; a conversation with one video in it."""
    sample = lines(line)[0]
    assert (sample.question, sample.answer, sample.without_answer().answer) == (question, answer, None)
    contents = [part for m in sample.messages if isinstance(m["content"], list) for part in m["content"]]
    assert [part["type"] for part in contents] == ["video", "text"]


def test_templates_of_question_and_answer(lines):
    sample = lines(
        {"query": "it moves", "relevant_windows": [[3, 7.5], [9, 10]]},
        prompt="When? {text}",
        answer="{start:.0f} - {end:.0f}",
    )[0]
    assert (sample.question, sample.answer) == ("When? it moves", "3 - 8, 9 - 10")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ({}, r"annotations\.jsonl:1: needs one of 'query'.*it has none"),
        ({"question": "a", "answer": "b", "caption": "c"}, r"it has \['question', 'caption'\]"),
        ({"query": "a"}, "a 'query' needs 'relevant_windows'"),
        ({"query": "a", "relevant_windows": [[2, 1]]}, "pairs of seconds"),
        ({"query": "a", "relevant_windows": []}, "pairs of seconds"),
        ({"question": "a"}, "field 'answer' is missing"),
        ({"question": "a", "answer": " "}, "field 'answer' is missing or no text"),
        ({"caption": 3}, "field 'caption' is missing or no text"),
        ({"messages": "hello"}, "must be objects with 'role' and 'content'"),
        ({"messages": [USER]}, "the user's and the assistant's"),
        ({"messages": [USER, SAID, USER]}, "the user's and the assistant's"),
        ({"messages": [{"role": "user", "content": "what?"}, SAID]}, r'must hold one \{"type": "video"\}'),
        (
            {"messages": [{"role": "user", "content": [*USER["content"], {"type": "image"}]}, SAID]},
            "and no images",
        ),
        ({"messages": [USER, {"role": "assistant", "content": []}]}, "has no text"),
    ],
)
def test_bad_lines_are_named(lines, line, wrong):
    with pytest.raises(ValueError, match=wrong):
        lines(line)


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("from 3.0 to 7.5 seconds", [(3.0, 7.5)]),
        ("From 3s to 7.5s, then between 0:59 and 1:07.5.", [(3.0, 7.5), (59.0, 67.5)]),
        ("3 - 7", [(3.0, 7.0)]),
        ("12–15 sec", [(12.0, 15.0)]),  # noqa: RUF001
        ("0:01:00 to 0:01:02", [(60.0, 62.0)]),
        ("[[3, 7.5], [9, 10]]", [(3.0, 7.5), (9.0, 10.0)]),
        ('The answer: {"start": "0:03", "end": 7.5, "note": "x"}', [(3.0, 7.5)]),
        ('[{"from": 1, "to": 2}]', [(1.0, 2.0)]),
        ("7.5 to 3", []),
        ("at second 3", []),
        ("", []),
        ("[1, 2, 3]", []),
    ],
)
def test_windows_in_answers(text, windows):
    assert parse_windows(text) == windows


def test_windows_that_are_said_are_read():
    windows = [(0.0, 1.0), (59.5, 61.2)]
    assert parse_windows(say_windows(windows)) == windows
    assert say_windows(windows, ANSWER) == "from 0.0 to 1.0 seconds, from 59.5 to 61.2 seconds"


def test_scores(lines):
    """Grounding: one to one, for missing and superfluous windows; ROUGE; the same words."""
    said = {
        "from 0 to 2 seconds": (50, 0, 1),  # one of two windows, whole
        "from 4 to 6 and 0 - 2": (100, 1, 1),
        "0 - 2, 4 - 6, 8 - 9": (200 / 3, 1, 1),
        "from 0 to 1 seconds": (25, 0, 1),
        "no idea": (0, 0, 0),
    }
    samples = lines({"query": "a", "relevant_windows": [[0, 2], [4, 6]]})[: len(said)]
    assert choose_metric("auto", samples) == "grounding"
    for sample, (text, (overlap, _, parsed)) in zip(samples, said.items(), strict=True):
        found = score([text], [sample], "grounding")
        assert found["mIoU"] == pytest.approx(overlap)
        assert found["parsed"] == 100 * parsed
        assert found["R1@0.5"] == 100 * (overlap > 20)
        assert found["R1@0.7"] == 100 * (overlap > 30)
    exact = score(["The red  square, moves!"], samples[:1], "exact")
    assert exact == {"exact": 0.0}


@pytest.mark.parametrize(
    ("answer", "said", "exact"), [("A red square.", "red SQUARE", 100), ("café", "cafe", 0), ("\uff12", "2", 100)]
)
def test_the_same_words(lines, answer, said, exact):
    samples = lines({"question": "what?", "answer": answer})[:1]
    assert choose_metric("auto", samples) == "exact"
    assert score([said], samples, "exact") == {"exact": exact}


def test_rouge_of_captions(lines):
    samples = lines({"caption": "Ein Mann läuft"})[:2]
    assert choose_metric("auto", samples) == "rouge"
    found = score(["ein Mann läuft", "Mann"], samples, "rouge")
    assert found["rouge1"] == pytest.approx((100 + 50) / 2)  # one of three words: precision 1, recall 1/3
    assert found["rouge2"] == pytest.approx(50)


def test_frames_have_their_times(tmp_path):
    """Evenly spaced, at most as many as asked for; indices over the rate are seconds."""
    write_video(tmp_path / "a.mp4", seconds=3, rate=4)
    for fps, most, count, last in ((2, 32, 6, 2.5), (100, 32, 12, 2.75), (2, 3, 3, 2.0), (0.1, 32, 1, 0.0)):
        frames, told = decode_frames(tmp_path / "a.mp4", fps, most)
        assert frames.shape == (count, 32, 32, 3)
        assert len(told.frames_indices) == count
        assert told.frames_indices[-1] / told.fps == pytest.approx(last)
        assert (told.fps, told.total_num_frames, told.duration) == (4, 12, 3)
    assert decode_frames(tmp_path / "a.mp4", 2, 2, 16 * 16)[0].shape == (2, 16, 16, 3)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"b\.mp4 can't be decoded"):
        decode_frames(tmp_path / "b.mp4", 2, 8)


def test_frames_are_shown_as_a_player_shows_them(tmp_path):
    """A phone's video upright, and wide pixels wide, made smaller or not."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:32, :64] = 255
    path = write(tmp_path / "a.mp4", images=[picture] * 8, length=0.8, size=(64, 128), pixel=Fraction(2))
    for most, shape in ((None, (256, 64)), (4096, (128, 32))):
        frames, told = decode_frames(Path(turned(path, (0, 1, -1, 0))), 1, 1, most)
        assert frames.shape == (1, *shape, 3)
        assert (told.height, told.width) == shape
        expected = np.zeros(frames.shape)
        expected[:, : shape[0] // 2, shape[1] // 2 :] = 255
        assert np.abs(frames - expected).mean() < 10


def test_options(tmp_path):
    """The command line counts over the file; the embedded default has its own; a new process gets the same."""
    file = tmp_path / "run.yaml"
    file.write_text("data: d\nmodel: m\nfps: 1\nmethod_config: {r: 4}\nlearning_rate: 0.5\nreport_to: [none]\n")
    options, training = parse_options(["--config", str(file), "--fps", "3", "--use_cpu", "True"])
    assert (options.fps, options.method_fields, training.learning_rate) == (3, {"r": 4}, 0.5)
    assert training.predict_with_generate
    assert isinstance(training, PvlaSeq2SeqTrainingArguments)
    assert parse_options([*command_line(options), "--use_cpu", "True"])[0] == options
    options, training = parse_options(["--use_cpu", "True", "--learning_rate", "0.1"])
    assert (options.max_frames, training.learning_rate, options.data) == (12, 0.1, None)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (["--data", "d"], "--data and --model go together"),
        (["--fps", "0"], "--fps must be above 0"),
        (["--method_config", "{r}"], "--method_config is no JSON"),
        (["--method_config", "[1]"], "must be an object"),
        (["--data", "d", "--model", "m", "--answer", "{start}"], "can't be read back"),
        (["--data", "d", "--model", "m", "--answer", "{when}"], "must hold {start} and {end} alone"),
        (["--config", "nowhere.yaml"], "can't be read"),
        (["--pvla_words", "some"], "--pvla_words|pvla_words="),
    ],
)
def test_bad_options_are_named(given, wrong, capsys):
    with pytest.raises(SystemExit) as error:
        parse_options([*given, "--use_cpu", "True"])
    said = f"{error.value}{capsys.readouterr().err}"
    assert re.search(wrong, said), said


def test_stories_and_marks():
    """An answer with a word a frame marks the windows that the line tells."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        story = digits.make_story(rng, of_three=True)
        digit = max(set(story.digits), key=story.digits.count)
        second = story.events(digit)[1]
        said = story.words([second])
        assert len(said.split()) == digits.FRAMES
        assert digits.parse_marks(said) == [story.window(second)]
        assert len(digits.parse_marks(story.words(story.events(digit)))) >= 1
