"""The question-answering example: clips, input and errors, late fusion, scores, and a whole run on tiny towers."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimodal_question_answering
from common.annotations import ANNOTATIONS
from common.embedded import WORDS, digit_images
from media_files import tone, write
from safetensors.torch import save_file
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from trimodal_qa import clips, late_fusion
from trimodal_qa.annotations import Annotation, answers_of, read_annotations
from trimodal_qa.inputs import Collator, make_examples, with_shuffled_sound, without_pictures
from trimodal_qa.methods import METHODS, Towers, load_base
from trimodal_qa.scores import choose_threshold, decide, micro_f1
from trimodal_qa.towers import DIGIT_HEAD, digit_head

from peft_read import TrimodalProcessor
from peft_read.trimodal.media import read_frames, read_sound


SCRIPT = Path(__file__).parents[2] / "examples" / "trimodal_question_answering.py"
# Without torchvision and torchaudio, transformers says that it does it another way.
pytestmark = pytest.mark.filterwarnings("ignore:.*(torchvision|torchaudio|mel filter).*")
WIDTH, FRAMES, BINS = 16, 4, 8


def write_clip(path, seed=0, frames=FRAMES):
    """A clip with a digit in each frame, and low and high tones in turn."""
    rng = np.random.default_rng(seed)
    images = digit_images()["train"]
    digits = rng.integers(10, size=(frames, 2))
    pictures = np.stack([clips.render_frame(rng, pair, images) for pair in digits])
    clips.write_clip(path, pictures, clips.render_sound(rng, np.arange(frames) % 2))


def write_data(folder, changes=(), splits=("train", "train", "train", "validation", "test")):
    """A data folder of short clips; `changes` are put over the fields of its lines, None takes a field away."""
    folder.mkdir()
    lines = []
    for number, split in enumerate(splits):
        write_clip(folder / f"{number}.mp4", number)
        answers = [[0.25 * number, 0.25 * number + 0.25, "three"], [5.0, 6.0, "four"]]
        line = {"video": f"{number}.mp4", "query": "digit at the low tone?", "answers": answers, "split": split}
        line |= dict(changes[number]) if number < len(changes) else {}
        lines.append(json.dumps({key: value for key, value in line.items() if value is not None}))
    (folder / ANNOTATIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_towers(tmp_path):
    """Three towers in folders, as a user has them."""
    folder = tmp_path / "towers"
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=(32, 64), patch_size=16, **shape)).save_pretrained(folder / "vision")
    ViTImageProcessorPil(do_resize=False).save_pretrained(folder / "vision")
    config = ASTConfig(patch_size=8, time_stride=8, frequency_stride=8, max_length=96, num_mel_bins=BINS, **shape)
    ASTModel(config).save_pretrained(folder / "audio")
    ASTFeatureExtractor(num_mel_bins=BINS, max_length=96).save_pretrained(folder / "audio")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "which", "digit", "at", "the", "low", "high", "tone", "?"]
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder / "text")
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "text")
    return Towers(*(str(folder / name) for name in ("vision", "audio", "text")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": None}, r"annotations\.jsonl:2: `answers` must be a list"),
        ({"answers": [[1, 0, "three"]]}, r"annotations\.jsonl:2: `answers` must be a list of \[start, end, answer\]"),
        ({"answers": [[0, 1, 3]]}, r"annotations\.jsonl:2: `answers` must be a list"),
        ({"answers": [[0, 1, "three"], [0.5, 2, "four"]]}, r"annotations\.jsonl:2: two `answers` overlap at 0\.5"),
        ({"query": ""}, r"annotations\.jsonl:2: field 'query' is missing"),
        ({"split": "dev"}, r"annotations\.jsonl:2: `split` must be one of"),
        ({"video": "gone.mp4"}, r"annotations\.jsonl:2: the video .*gone\.mp4 isn't there"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    """Which line, and what is wrong with it."""
    folder = write_data(tmp_path / "data", [{}, change])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_annotations(folder)


def test_answers_that_cannot_be_learnt_are_named(tmp_path):
    """An answer that only test clips have, or none at all in the training clips."""
    folder = write_data(tmp_path / "a", [{}] * 4 + [{"answers": [[0, 1, "nine"]]}])
    with pytest.raises(ValueError, match=r"annotations\.jsonl:5: the answer 'nine' isn't in any line with split"):
        read_annotations(folder)
    folder = write_data(tmp_path / "b", [{"answers": []}] * 3)
    with pytest.raises(ValueError, match="nothing to learn"):
        read_annotations(folder)


def test_a_frame_has_the_answer_at_its_middle():
    """Ends are excluded, and what lies beyond the clip counts for nothing."""
    answers = ((0.0, 0.5, "one"), (0.5, 0.6, "two"), (0.7, 1.2, "three"), (9.0, 10.0, "four"))
    annotation = Annotation(Path("a.mp4"), "q", "train", answers, "f:1")
    assert annotation.at([0.25, 0.75, 1.25, 1.75]) == ["one", "three", None, None]
    assert annotation.at([0.5, 1.5]) == ["two", None]
    assert answers_of([annotation]) == ["four", "one", "three", "two"]


@pytest.mark.parametrize("kind", clips.FRAMES)
def test_questions_ask_for_what_the_clip_holds(kind):
    """The answers are the digits of the frames, or shots, with the tone; told from the clip by a loop."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        clip = clips.make_clip(rng, kind)
        asked = next(sound for sound, (name, _) in clips.TONES.items() if name in clip.query)
        sides = [side for side, name in enumerate(clips.SIDES) if name in clip.query] or [0, 1]
        span = clips.SHOT if kind == "long" else 1
        for frame in range(clips.FRAMES[kind]):
            start = frame // span * span
            heard = asked in clip.sounds[start : start + span]
            seen = [digit for digit in clip.digits[frame, sides] if digit != clips.NOTHING]
            assert len(seen) <= 1
            assert clip.answers[frame] == (seen[0] if heard and seen else clips.NOTHING)
        assert (clip.answers != clips.NOTHING).sum() == 3


def test_sound_is_where_its_frame_is(tmp_path):
    """In the encoded file: of each quarter of a second, the loudest frequency is its frame's tone."""
    write_clip(tmp_path / "a.mp4")
    assert read_frames(tmp_path / "a.mp4", 99).shape == (FRAMES, 32, 64, 3)
    sound = read_sound(tmp_path / "a.mp4", clips.RATE)
    for frame, (_, hertz) in zip(range(FRAMES), [*clips.TONES.values()] * 2, strict=True):
        spectrum = np.abs(np.fft.rfft(sound[4000 * frame : 4000 * frame + 4000]))
        assert spectrum.argmax() * 4 == pytest.approx(hertz, rel=0.13)


def test_labels_go_by_the_time_of_frames(tmp_path, tiny_towers):
    """Of a clip that begins late, with frames at any times; and a batch of it beside a short one, in segments."""
    begins = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 3.0, 4.5]
    path = write(tmp_path / "phone.mkv", begins, 5.0, sound=tone(4.0, []), sound_start=1.0)
    annotation = Annotation(Path(path), "what is seen", "train", ((1.0, 2.0, "one"), (3.5, 4.5, "two")), "f:1")
    processor = TrimodalProcessor.from_pretrained_towers(
        tiny_towers.vision, tiny_towers.audio, tiny_towers.text, num_frames=4
    )
    (long,) = make_examples([annotation], processor, ["one", "two"])
    assert long["frame_times"][:, 0].tolist() == pytest.approx([1, 2.25, 3.5, 4.75], abs=0.1)
    assert long["labels"].tolist() == [0, 2, 1, 2]
    write_clip(tmp_path / "a.mp4")
    short = Annotation(tmp_path / "a.mp4", "what", "train", (), "f:2")
    examples = [long, *make_examples([short], processor, ["one", "two"])]
    batch = Collator()(examples)
    assert batch["frame_times"].shape == (2, 4, 2)
    assert batch["audio_times"].shape[2:] == (2,)
    assert batch["audio_mask"].ndim == batch["input_values"].ndim - 1 == 3
    base = load_base(tiny_towers, ["one", "two"])
    assert base(**batch).logits.shape == (2, 4, 3)
    assert len(late_fusion.encode(base, examples)) == 2


def test_a_video_that_cannot_be_read_is_named(tmp_path, tiny_towers):
    """Its name is in the message."""
    (tmp_path / "text.mp4").write_bytes(b"no video at all" * 100)
    annotation = Annotation(tmp_path / "text.mp4", "q", "train", (), "f:1")
    processor = TrimodalProcessor.from_pretrained_towers(tiny_towers.vision, tiny_towers.audio, tiny_towers.text)
    with pytest.raises(ValueError, match=r"text\.mp4 can't be read as a media file"):
        make_examples([annotation], processor, [])


def test_made_clips_can_be_read_back(tmp_path, tiny_towers, monkeypatch):
    """The labels of the examples are the answers of the clips; made once; a seed leaves the test clips alone."""
    monkeypatch.setattr(clips, "SIZES", {"train": 20, "validation": 1, "test": 2})
    for seed in (0, 1):
        clips.make_dataset(tmp_path / f"data{seed}", "short", seed)
    annotations, others = (read_annotations(tmp_path / f"data{seed}") for seed in (0, 1))
    of_split = [(a.split, a.query, a.answers) for a in annotations], [(b.split, b.query, b.answers) for b in others]
    assert of_split[0][-2:] == of_split[1][-2:]
    assert of_split[0][:20] != of_split[1][:20]
    answers = answers_of(annotations)
    processor = TrimodalProcessor.from_pretrained_towers(
        tiny_towers.vision, tiny_towers.audio, tiny_towers.text, num_frames=8
    )
    examples = make_examples(annotations[:6], processor, answers)
    rng = np.random.default_rng((0, 0))
    for example in examples:
        clip = clips.make_clip(rng, "short")
        for digits in clip.digits:
            clips.render_frame(rng, digits, digit_images()["train"])
        clips.render_sound(rng, clip.sounds)
        said = [None if label == len(answers) else answers[label] for label in example["labels"]]
        assert said == [None if digit == clips.NOTHING else WORDS[digit] for digit in clip.answers]
    before = (tmp_path / "data0" / ANNOTATIONS).stat().st_mtime_ns
    clips.make_dataset(tmp_path / "data0", "short")
    assert (tmp_path / "data0" / ANNOTATIONS).stat().st_mtime_ns == before


def some_examples():
    """Two of different lengths, the second without sound."""
    torch.manual_seed(0)
    examples = []
    for frames, words in ((4, 3), (2, 5)):
        examples.append(
            {
                "pixel_values": torch.randn(frames, 3, 4, 4),
                "frame_mask": torch.ones(frames, dtype=torch.long),
                "frame_times": torch.stack([torch.arange(frames), torch.arange(1, frames + 1)], -1) / 4,
                "input_ids": torch.arange(words),
                "attention_mask": torch.ones(words, dtype=torch.long),
                "labels": torch.arange(frames),
            }
        )
    examples[0] |= {"input_values": torch.randn(8, 2), "audio_mask": torch.ones(8, dtype=torch.long)}
    examples[0]["audio_times"] = torch.tensor([0.0, 0.125])
    return examples


def test_batches_are_padded_and_masked():
    """What is missing or padding has a mask of 0 and a label of -100."""
    batch = Collator()(some_examples())
    assert batch["frame_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["audio_mask"].tolist() == [[1] * 8, [0] * 8]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["labels"].tolist() == [[0, 1, 2, 3], [0, 1, -100, -100]]
    assert set(Collator({"vision", "text"})(some_examples())) == set(batch) - {
        "input_values",
        "audio_mask",
        "audio_times",
    }


def test_what_pairs_and_shuffled_sound_leave_out():
    """Blank frames; the same parts of the sound in another order, and all else untouched."""
    example = some_examples()[0]
    blank = without_pictures([example])[0]
    assert not blank["pixel_values"].any()
    assert blank["input_values"] is example["input_values"]
    shuffled = [each["input_values"] for each in with_shuffled_sound([example] * 20, seed=0)]
    parts = {part.numpy().tobytes() for part in example["input_values"].split(2)}
    assert all({part.numpy().tobytes() for part in sound.split(2)} == parts for sound in shuffled)
    assert not all(torch.equal(sound, shuffled[0]) for sound in shuffled)


def test_scores_by_hand():
    """Three frames with answers, of which one is found, one is answered wrong and one isn't; one false alarm."""
    examples = [{"labels": torch.tensor([0, 1])}, {"labels": torch.tensor([2, 0, 2])}]
    probabilities = [
        np.array([[0.6, 0.1, 0.3], [0.7, 0.2, 0.1]]),
        np.array([[0.2, 0.5, 0.3], [0.1, 0.0, 0.9], [0.1, 0.1, 0.8]]),
    ]
    assert decide(probabilities[1], 0.5).tolist() == [1, 2, 2]
    assert micro_f1(probabilities, examples, 0.5) == pytest.approx(100 * 2 * 1 / (3 + 3))
    assert micro_f1(probabilities, examples, 0.15) == pytest.approx(100 * 2 * 1 / (4 + 3))
    assert micro_f1(probabilities, examples, 0.05) == pytest.approx(100 * 2 * 2 / (5 + 3))
    sure, unsure = np.array([[0.5, 0.1, 0.4]]), np.array([[0.02, 0.3, 0.68]])
    frames = [{"labels": torch.tensor([0])}, {"labels": torch.tensor([2])}]
    assert choose_threshold([sure, unsure], frames) == pytest.approx(0.35)


def encoded_examples():
    torch.manual_seed(0)
    return [
        {
            "pictures": torch.randn(frames, 12),
            "sounds": torch.randn(frames, 5),
            "words": torch.randn(words, 7),
            "labels": torch.randint(3, (frames,)),
        }
        for frames, words in ((6, 3), (4, 5))
    ]


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("late")])
def test_late_fusion_ignores_padding(name):
    """Clips and questions of different lengths in one batch get what they get alone; padding has no loss."""
    examples = encoded_examples()
    head = METHODS[name].head(examples, 3, nn.Linear(6, 3), **METHODS[name].options).eval()
    together = head(**late_fusion.collate(examples))
    alone = [head(**late_fusion.collate([example])) for example in examples]
    for row, (example, one) in enumerate(zip(examples, alone, strict=True)):
        assert torch.allclose(together["logits"][row, : len(example["labels"])], one["logits"][0], atol=1e-6)
    assert torch.allclose(together["loss"] * 10, alone[0]["loss"] * 6 + alone[1]["loss"] * 4, atol=1e-5)


@pytest.mark.parametrize(("window", "means"), [(1, [0, 1, 2, 3, 4, 5]), (4, [1.5] * 4 + [4.5] * 2), (None, [2.5] * 6)])
def test_sound_of_a_window(window, means):
    """What of the sound the perceptron sees at each frame."""
    examples = encoded_examples()[:1]
    examples[0]["sounds"] = torch.arange(6.0)[:, None].expand(6, 5)
    head = late_fusion.FrameMlp(examples, 3, None, window=window)
    seen = []
    head.norms["sounds"] = nn.Identity()
    head.norms["sounds"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    head(**late_fusion.collate(examples))
    assert torch.allclose(seen[0][0, :, 0], torch.tensor(means, dtype=torch.float))


def test_encoded_clips_are_what_the_towers_find(tmp_path, tiny_towers):
    """Each tower run by itself on one example, and its states averaged by hand; zeros where there is no sound."""
    annotations = read_annotations(write_data(tmp_path / "data"))
    processor = TrimodalProcessor.from_pretrained_towers(
        tiny_towers.vision, tiny_towers.audio, tiny_towers.text, num_frames=FRAMES
    )
    examples = make_examples(annotations[:3], processor, ["four", "three"])
    assert [example["labels"].tolist() for example in examples] == [[1, 2, 2, 2], [2, 1, 2, 2], [2, 2, 1, 2]]
    for name in ("input_values", "audio_mask", "audio_times"):
        del examples[1][name]
    base = load_base(tiny_towers, ["four", "three"])
    encoded = late_fusion.encode(base, examples)
    with torch.no_grad():
        pictures = base.vision_model(examples[2]["pixel_values"]).last_hidden_state
        sounds = base.audio_model(examples[2]["input_values"][None]).last_hidden_state[0, 2:]
        words = base.text_model(examples[2]["input_ids"][None]).last_hidden_state[0]
    expected = torch.cat([pictures.mean(1), pictures[:, 0]], 1)
    assert torch.allclose(encoded[2]["pictures"], expected, atol=1e-6)
    assert torch.allclose(encoded[2]["sounds"], sounds.unflatten(0, (FRAMES, 3)).mean(1), atol=1e-6)
    assert torch.allclose(encoded[2]["words"], words, atol=1e-6)
    assert encoded[1]["sounds"].shape == (FRAMES, WIDTH)
    assert not encoded[1]["sounds"].any()


def test_the_model_starts_from_what_its_tower_knows(tiny_towers):
    """Logits are those of the digit head on the mean of the vision tower's tokens, for the answers in their order."""
    torch.manual_seed(0)
    saved = {"weight": torch.randn(11, WIDTH), "bias": torch.randn(11)}
    save_file(saved, Path(tiny_towers.vision) / DIGIT_HEAD)
    answers = ["four", "one"]
    model = load_base(tiny_towers, answers)
    pixels = torch.randn(2, 3, 3, 32, 64)
    with torch.no_grad():
        logits = model(pixel_values=pixels, input_ids=torch.tensor([[2, 5, 3]] * 2)).logits
        states = model.vision_model(pixels.flatten(0, 1)).last_hidden_state.mean(1)
    every = nn.functional.layer_norm(states, (WIDTH,)) @ saved["weight"].T + saved["bias"]
    assert torch.allclose(logits.flatten(0, 1), every[:, [4, 1, 10]], atol=1e-3)
    assert digit_head(tiny_towers.vision, ["yes"]) is None
    assert digit_head(tiny_towers.audio, answers) is None


def test_a_users_own_clips_and_towers(tmp_path, tiny_towers, monkeypatch, capfd):
    """Data folder in, table, picture and adapter out; the script itself checks the adapter in a new process."""
    data = write_data(tmp_path / "data")
    arguments = ["--vision", tiny_towers.vision, "--audio", tiny_towers.audio, "--text", tiny_towers.text]
    arguments += ["--data", data, "--frames", 4, "--output", tmp_path / "out", "--steps", 2]
    methods = ["lstta", "sound+text", "shuffled-sound", "late-mlp", "late-attention"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(SCRIPT.parents[1])]))  # of a process that it starts
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--methods", *methods])
    trimodal_question_answering.main()
    assert "Loaded again in a new process: test F1" in capfd.readouterr().out
    assert (tmp_path / "out" / "answers.png").stat().st_size > 5000
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "| data | test | micro F1 |" in (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(results) == methods


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "mine"], "mine isn't empty and wasn't written by this script"),
        (["--vision", "my_tower"], "--vision, --audio and --text go together"),
        (["--data", "mine"], "--data needs --vision, --audio and --text"),
        (["--methods", "lora"], "invalid choice: 'lora'"),
        (["--steps", "0"], "--steps and --frames must be positive"),
    ],
)
def test_mistakes_on_the_command_line_are_told_at_once(tmp_path, monkeypatch, capsys, arguments, message):
    """Before anything is made."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("precious", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--cache", "cache", *arguments])
    with pytest.raises(SystemExit) as stopped:
        trimodal_question_answering.main()
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert [str(path) for path in Path().rglob("*")] == ["mine", "mine/thesis.txt"]
