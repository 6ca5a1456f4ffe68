"""The video example: its input, its errors, its model, and a whole run on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import finetune_video
import numpy as np
import pytest
import torch
from common.annotations import decode_clips
from common.embedded import WORDS, digit_images
from common.saved import check_saved_adapter
from devices import free_port
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel
from video_grounding import ordered_digits
from video_grounding.annotations import Annotation, read_annotations, read_captions
from video_grounding.features import Collator, make_pair_examples
from video_grounding.modeling import GroundingConfig, GroundingModel
from video_grounding.training import grounding_metrics


SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_video.py"


def write_video(path, seconds, rate=4, audio_only=False):
    """A video whose brightness is its second times ten."""
    with av.open(str(path), "w") as container:
        if audio_only:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
        else:
            stream = container.add_stream("libx264", rate=rate)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for index in range(round(seconds * rate)):
                frame = np.full((32, 32, 3), 10 * (index // rate), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_data(folder, changes=(), splits=("train", "train", "train", "validation", "test")):
    """A data folder of short videos; `changes` are put over the fields of its lines, None takes a field away."""
    folder.mkdir()
    lines = []
    for number, split in enumerate(splits):
        write_video(folder / f"{number}.mp4", seconds=4 + number % 2)
        line = {"video": f"{number}.mp4", "query": "the five", "relevant_windows": [[1.0, 2.0]], "split": split}
        line |= dict(changes[number]) if number < len(changes) else {}
        lines.append(json.dumps({key: value for key, value in line.items() if value is not None}))
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_pairs(folder, count=3, **changes):
    """A folder of captioned videos."""
    folder.mkdir()
    lines = []
    for number in range(count):
        write_video(folder / f"{number}.mp4", seconds=3 + number)
        lines.append({"video": f"{number}.mp4", "caption": "a five and a six"})
    lines[-1] |= changes
    (folder / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_pairs_are_read_and_bad_ones_named(tmp_path, tiny_tokenizer):
    """Video and caption of each line, no split and no labels; examples of them make a batch without labels."""
    captions = read_captions(write_pairs(tmp_path / "good"))
    assert [(pair.video.name, pair.caption) for pair in captions] == [
        (f"{n}.mp4", "a five and a six") for n in range(3)
    ]
    examples = make_pair_examples(captions, lambda frames: torch.zeros(len(frames), 4), tiny_tokenizer, 1.0)
    batch = Collator(tiny_tokenizer)(examples)
    assert "labels" not in batch
    assert batch["frame_mask"].sum(1).tolist() == [3, 4, 5]
    for name, changes, message in (
        ("no_caption", {"caption": ""}, r"annotations\.jsonl:3: field 'caption' is missing"),
        ("no_video", {"video": "gone.mp4"}, r"annotations\.jsonl:3: the video .*gone\.mp4 isn't there"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_captions(write_pairs(tmp_path / name, **changes))
    with pytest.raises(FileNotFoundError, match="--pairs names a folder"):
        read_captions(tmp_path)
    (tmp_path / "annotations.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no line"):
        read_captions(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, r"annotations\.jsonl:2: field 'query' is missing"),
        ({"video": 7}, r"annotations\.jsonl:2: field 'video' is missing or no text"),
        ({"split": "dev"}, r"annotations\.jsonl:2: `split` must be one of .*'dev'"),
        ({"relevant_windows": None}, r"annotations\.jsonl:2: needs either 'relevant_windows' or 'clip_labels'"),
        ({"clip_labels": [0, 1]}, r"annotations\.jsonl:2: needs either .* not both"),
        ({"relevant_windows": [[3, 1]]}, r"annotations\.jsonl:2: `relevant_windows` must be pairs of seconds"),
        ({"relevant_windows": None, "clip_labels": [0, 2]}, r"annotations\.jsonl:2: `clip_labels` must be"),
        ({"video": "gone.mp4"}, r"annotations\.jsonl:2: the video .*gone\.mp4 isn't there"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    """Which line, and what is wrong with it."""
    folder = write_data(tmp_path / "data", [{}, change])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_annotations(folder)


def test_a_line_that_is_no_json_or_a_missing_split_or_file(tmp_path):
    """The other ways in which a data folder can be wrong."""
    with pytest.raises(FileNotFoundError, match=r"annotations\.jsonl isn't there"):
        read_annotations(tmp_path)
    folder = write_data(tmp_path / "data", splits=("train", "test"))
    with pytest.raises(ValueError, match="no line with split 'validation'"):
        read_annotations(folder)
    (folder / "annotations.jsonl").write_text("{oops\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"annotations\.jsonl:1: not valid JSON"):
        read_annotations(folder)


def test_decodes_the_middle_of_each_clip(tmp_path):
    """One frame a clip, the right one; half a clip at the end counts."""
    write_video(tmp_path / "a.mp4", seconds=4.75)
    frames = decode_clips(tmp_path / "a.mp4", clip_seconds=1.0)
    assert frames.shape == (5, 32, 32, 3)
    assert np.allclose(frames.mean((1, 2, 3)), [0, 10, 20, 30, 40], atol=3)
    assert len(decode_clips(tmp_path / "a.mp4", clip_seconds=2.0)) == 2


def test_videos_that_cannot_be_decoded_are_named(tmp_path):
    """Empty, foreign, truncated, without pictures, too short: an error with the file's name."""
    write_video(tmp_path / "good.mp4", seconds=2)
    write_video(tmp_path / "sound.mp4", seconds=2, audio_only=True)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"no video at all" * 100)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    for name in ("empty.mp4", "text.mp4", "cut.mp4"):
        with pytest.raises(ValueError, match=rf"{name} (can't be decoded|holds no frame)"):
            decode_clips(tmp_path / name, 1.0)
    with pytest.raises(ValueError, match=r"sound\.mp4 has no video stream"):
        decode_clips(tmp_path / "sound.mp4", 1.0)
    with pytest.raises(ValueError, match=r"good\.mp4 is 2\.00 seconds long, shorter than half a clip"):
        decode_clips(tmp_path / "good.mp4", 10.0)


def test_windows_become_labels():
    """A clip is meant if at least half of it is covered; explicit labels need the right number."""
    annotation = Annotation(Path("a.mp4"), "q", "train", [[0.6, 2.0], [3.5, 4.0]], None, "f:1")
    assert annotation.labels(5, 1.0).tolist() == [0, 1, 0, 1, 0]
    assert annotation.labels(2, 2.0).tolist() == [1, 0]
    labelled = Annotation(Path("a.mp4"), "q", "train", None, [0, 1], "f:1")
    assert labelled.labels(2, 1.0).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"f:1: 2 `clip_labels`, but a\.mp4 has 3 clips"):
        labelled.labels(3, 1.0)


def test_stories_ask_for_what_order_decides():
    """The embedded task: no digit twice in a row, every clip accounted for, no image in two splits."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        story = ordered_digits.make_story(rng)
        assert len(story.event_of_clip) == ordered_digits.NUM_CLIPS
        assert sorted(set(story.event_of_clip) - {-1}) == list(range(len(story.digits)))
        assert all(a != b for a, b in zip(story.digits, story.digits[1:], strict=False))
    pools = digit_images()
    seen = [{image.tobytes() for images in pool.values() for image in images} for pool in pools.values()]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_captions_name_what_a_video_shows(tmp_path):
    """The embedded pairs: every digit of the story once, in words, and nothing of order."""
    ordered_digits.make_pairs(tmp_path / "pairs", videos=2)
    stories = np.random.default_rng((0, 4))
    for pair in read_captions(tmp_path / "pairs"):
        story = ordered_digits.make_story(stories)
        ordered_digits.render(stories, story, digit_images()["train"], ordered_digits.FRAMES_PER_CLIP)
        shown = [WORDS[digit] for digit in stories.permutation(sorted(set(story.digits)))]
        assert pair.caption.replace(" and", ",").split(", ") == [f"a {word}" for word in shown]
        assert len(decode_clips(pair.video, 1.0)) == ordered_digits.NUM_CLIPS


def tiny_text_config():
    return BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def grounding_examples():
    """Queries of [CLS], words and [SEP], and videos, of different lengths."""
    return [
        {
            "input_ids": [2, *range(5, 5 + words), 3],
            "word_mask": [0] + [1] * words + [0],
            "frame_features": torch.randn(frames, 4),
            "labels": torch.ones(frames),
        }
        for words, frames in ((2, 6), (5, 3), (1, 1))
    ]


def forward(model, batch):
    names = ("input_ids", "attention_mask", "frame_features", "frame_mask")
    return model(**{name: batch[name] for name in names})


def test_padding_never_changes_a_saliency(tiny_tokenizer):
    """Queries and videos of different lengths in one batch rate as they do alone."""
    torch.manual_seed(0)
    model = GroundingModel(GroundingConfig(tiny_text_config(), feature_size=4, sep_token_id=3)).eval()
    examples = grounding_examples()
    collate = Collator(tiny_tokenizer)
    together = forward(model, collate(examples))
    for row, example in enumerate(examples):
        alone = forward(model, collate([example]))
        frames = len(example["labels"])
        assert torch.allclose(together.logits[row, :frames], alone.logits[0], atol=1e-6)


@pytest.mark.parametrize("separator", [None, 3])
def test_the_token_masks_are_those_of_the_model_s_sequence(tiny_tokenizer, separator):
    """What the text transformer is given at the masked positions is the projected frames, and the query's words."""
    model = GroundingModel(GroundingConfig(tiny_text_config(), feature_size=4, sep_token_id=separator)).eval()
    if separator is None:
        tiny_tokenizer.sep_token = None
    given = {}
    model.text_model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    examples = grounding_examples()
    batch = Collator(tiny_tokenizer)(examples)
    forward(model, batch)
    embed = model.text_model.get_input_embeddings()
    for row, example in enumerate(examples):
        inputs = given["inputs_embeds"][row]
        words = torch.tensor(example["input_ids"][1:-1])
        assert torch.equal(inputs[batch["text_token_mask"][row]], embed(words))
        frames = model.frame_projection(example["frame_features"])
        assert torch.allclose(inputs[batch["video_token_mask"][row]], frames, atol=1e-6)


def test_metrics_by_hand():
    """Two queries: average precisions 1 and (1/2 + 2/3) / 2; the first clip is right in one of them."""
    examples = [{"labels": torch.tensor(labels)} for labels in ([0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0])]
    saliency = [np.array([-1.0, 2.0]), np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0])]
    metrics = grounding_metrics(saliency, examples)
    assert metrics["mAP"] == pytest.approx(100 * (1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert metrics["hit@1"] == 50


@pytest.fixture
def tiny_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "five"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return BertTokenizer(str(tmp_path / "vocab.txt"))


@pytest.fixture
def tiny_models(tmp_path, tiny_tokenizer):
    """A text transformer and a vision model in folders, as a user has them."""
    folder = tmp_path / "models"
    torch.manual_seed(0)
    BertModel(tiny_text_config()).save_pretrained(folder / "text")
    tiny_tokenizer.save_pretrained(folder / "text")
    vision = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    ViTModel(vision).save_pretrained(folder / "vision")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vision")
    return folder


def run(*arguments, **kwargs):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["", str(SCRIPT.parents[1])]).strip(os.pathsep)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)


def call(monkeypatch, *arguments):
    """The script's `main` in this process, which spares importing it all again."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(SCRIPT.parents[1])]))  # of a process that it starts
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    finetune_video.main()


@pytest.mark.parametrize("method", ["read", "lora"])
def test_a_users_own_data_and_models(method, tmp_path, tiny_models, monkeypatch, capfd):
    """Data folder in, metrics, picture and adapter out; the script itself checks the adapter in a new process."""
    output = tmp_path / "out"
    arguments = ["--data", write_data(tmp_path / "data"), "--output", output, "--steps", 2, "--method", method]
    arguments += ["--model", tiny_models / "text", "--frame-encoder", tiny_models / "vision"]
    if method == "read":
        arguments += ["--pvla-weight", 3, "--pvla-states", "inputs", "--pvla-negatives", "--projection", "new"]
        done = run(*arguments, "--pairs", write_pairs(tmp_path / "pairs"))
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        call(monkeypatch, *arguments)
        printed = capfd.readouterr().out
    assert "Loaded again in a new process: test mAP" in printed
    assert (output / "saliency.png").stat().st_size > 5000
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    card = (output / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ("| data | test | mAP |" in card) == (method == "read")
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {method, "head"}


def test_two_machines(tmp_path, tiny_models):
    """Two launches that meet at one address train together; one of them writes, prints and checks the adapter."""
    data = write_data(tmp_path / "data")
    script = [SCRIPT, "--data", data, "--model", tiny_models / "text", "--frame-encoder", tiny_models / "vision"]
    script += ["--output", tmp_path / "out", "--steps", 2, "--pvla-weight", 0.1]
    launch = ["-m", "accelerate.commands.launch", "--config_file", SCRIPT.parent / "accelerate" / "ddp.yaml"]
    launch += ["--num_machines", 2, "--num_processes", 2]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--machine_rank"]
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    machines = [
        subprocess.Popen(
            [sys.executable, *map(str, [*launch, rank, *script])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    done = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], [stderr for _, stderr in done]
    printed = "".join(stdout for stdout, _ in done)
    for once in ("read: ", "test mAP  hit@1", "Loaded again in a new process: test mAP"):
        assert printed.count(once) == 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_the_user_has_is_not_overwritten(tmp_path, monkeypatch):
    """A folder that holds something else is refused before anything is made."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SystemExit, match="wasn't written by this script"):
        call(monkeypatch, "--output", tmp_path / "mine", "--cache", tmp_path / "cache")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "loar"], "--method loar is no PEFT method"),
        (["--method-config", '{"cell": "mamba"}'], "`cell` must be one of"),
        (["--method", "lora", "--pvla-weight", "0.1"], "align the blocks that --method read adapts"),
        (["--method-config", "{r: 4}"], "no object of JSON"),
        (["--pairs"], "--pairs are aligned by PVLA: set --pvla-weight"),
        (["--data", "mine"], "name a --model and a --frame-encoder"),
    ],
)
def test_a_wrong_command_is_refused_at_once(arguments, message, tmp_path, monkeypatch, capsys):
    """Before data and base are made: no such method, a field that it can't have, videos without models for them."""
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *arguments, "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("option", ["--data", "--pairs"])
def test_a_wrong_folder_is_refused_at_once(option, tmp_path, monkeypatch):
    """Before models are looked up, and anything is made."""
    arguments = ["--model", "m", "--frame-encoder", "e", "--pvla-weight", 1, option, tmp_path / "nowhere"]
    with pytest.raises(FileNotFoundError, match=r"annotations\.jsonl isn't there"):
        call(monkeypatch, *arguments, "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_saved_adapter_that_gives_something_else_is_found(tmp_path):
    """Loaded again in a new process, where another result ends the example."""
    script = tmp_path / "evaluate.py"
    script.write_text("print('loading'); print('{\"test_mAP\": 90.0}')", encoding="utf-8")
    assert check_saved_adapter(str(script), tmp_path, [], {"test_mAP": 90.001}) == {"test_mAP": 90.0}
    with pytest.raises(SystemExit, match=r"The loaded adapter gives .*90\.0.*, the trained one gave .*91\.0"):
        check_saved_adapter(str(script), tmp_path, [], {"test_mAP": 91.0})
