"""The processor: real media files in, batches out whose frames, sound and masks are what the files hold."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from media_files import RATE, SIDE, TONE, tokenizer, write_video, write_wav
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    ASTFeatureExtractor,
    AutoProcessor,
    ClapFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from trimodal_families import tower

from peft_read import TrimodalModel, TrimodalProcessor
from peft_read.trimodal.media import even_places, read_frames, read_sound, resample


# Without torchvision and torchaudio, transformers says that it does it another way.
pytestmark = pytest.mark.filterwarnings("ignore:.*(torchvision|torchaudio|mel filter).*")


def images():
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.0] * 3, image_std=[1.0] * 3)


def processor(vision=None, audio=None, **options):
    vision, audio = vision or images(), audio or Wav2Vec2FeatureExtractor(do_normalize=False)
    return TrimodalProcessor(vision, audio, tokenizer(), **{"num_frames": 4} | options)


def pitch(wave, rate=RATE):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(np.fft.rfftfreq(len(wave), 1 / rate)[spectrum.argmax()])


def test_even_places():
    assert even_places(8, 4).tolist() == [1, 3, 5, 7]
    assert even_places(10, 3).tolist() == [1, 5, 8]
    assert even_places(3, 8).tolist() == [0, 1, 2]


def test_frames_and_sound_of_a_file(tmp_path):
    """The frames are those in the middle of equal parts; the track has its pitch and length at the wanted rate."""
    path = write_video(tmp_path / "clip.mp4", frames=8)
    frames = read_frames(path, 4)
    assert frames.shape == (4, SIDE, SIDE, 3)
    assert np.abs(frames.mean((1, 2, 3)) - [25, 75, 125, 175]).max() < 6
    assert len(read_frames(path, 100)) == 8
    sound = read_sound(path, 8000)
    assert abs(len(sound) - 8000) < 600  # the codec pads to whole blocks
    assert abs(pitch(sound[1000:7000], 8000) - TONE) < 3
    assert read_sound(write_video(tmp_path / "mute.mp4", sound=False), RATE) is None


def test_files_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no video track"):
        read_frames(write_wav(tmp_path / "tone.wav"), 4)


def test_resampled_sound_keeps_its_pitch():
    wave = np.sin(2 * np.pi * TONE * np.arange(8000) / 8000).astype(np.float32)
    sound = resample(wave, 8000, RATE)
    assert abs(len(sound) - 16000) < 64
    assert abs(pitch(sound[2000:14000]) - TONE) < 3
    assert resample(wave, 8000, 8000) is not None


@pytest.mark.parametrize(("rate", "wanted"), [(8000, RATE), (44100, RATE), (RATE, 48000)])
def test_no_sound_is_lost_at_the_end(rate, wanted):
    """Down to the last sample, of long sounds and of short ones."""
    for count in (rate, 441):
        wave = np.sin(np.arange(count) / 5).astype(np.float32)
        assert abs(len(resample(wave, rate, wanted)) - count * wanted / rate) <= 1


def test_a_batch_of_files(tmp_path):
    """Videos of different lengths with their own tracks: sampled, filled up, masked."""
    paths = [write_video(tmp_path / "long.mp4", 8), write_video(tmp_path / "short.mp4", 3)]
    batch = processor()(videos=paths, audio="videos", text=["what is seen", "heard"])
    pictures, sound = {"pixel_values", "frame_mask", "frame_times"}, {"input_values", "audio_mask", "audio_times"}
    assert set(batch) == {*pictures, *sound, "input_ids", "attention_mask"}
    assert set(batch) == set(processor().model_input_names)
    assert batch["pixel_values"].shape == (2, 4, 3, SIDE, SIDE)
    assert batch["frame_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    levels = batch["pixel_values"].mean((2, 3, 4)) * 255
    expected = torch.tensor([[25.0, 75.0, 125.0, 175.0], [0.0, 25.0, 50.0, 0.0]])
    torch.testing.assert_close(levels, expected, rtol=0, atol=6)
    seconds = batch["audio_mask"].sum(1) / RATE
    torch.testing.assert_close(seconds, torch.tensor([1.0, 0.375]), rtol=0, atol=0.1)
    assert abs(pitch(batch["input_values"][0, 2000:14000].numpy()) - TONE) < 3
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[2, 3, 5], [4, 0, 0]]


def test_all_kinds_of_videos_are_the_same(tmp_path):
    """A file's frames as an array, a tensor, a list of images."""
    path = write_video(tmp_path / "clip.mp4", 8)
    array = read_frames(path, 8)
    kinds = [path, array, torch.from_numpy(array).permute(0, 3, 1, 2), [Image.fromarray(frame) for frame in array]]
    batch = processor()(videos=kinds, text=["seen"] * 4)
    for row in batch["pixel_values"][1:]:
        assert torch.equal(row, batch["pixel_values"][0])


def test_missing_media_are_masked_out(tmp_path):
    """None in a list, a video without a track; what all lack isn't in the batch."""
    paths = [write_video(tmp_path / "mute.mp4", sound=False), None, write_video(tmp_path / "clip.mp4")]
    batch = processor()(videos=paths, audio="videos", text=[None, "heard", None])
    assert batch["frame_mask"].sum(1).tolist() == [4, 0, 4]
    assert (batch["audio_mask"].sum(1) > 0).tolist() == [False, False, True]
    assert batch["attention_mask"].sum(1).tolist() == [0, 1, 0]
    without = processor()(videos=paths[:1], audio="videos", text=[None])
    assert set(without) == {"pixel_values", "frame_mask", "frame_times"}


def test_a_missing_text_is_masked_out_with_what_the_tokenizer_adds():
    """Such as [CLS] and [SEP], of which BERT's makes every text."""
    words = tokenizer()
    special = [("[CLS]", 6), ("[SEP]", 7)]
    words.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    words.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    made = TrimodalProcessor(None, Wav2Vec2FeatureExtractor(do_normalize=False), words)
    batch = made(audio=[np.zeros(1600, np.float32)] * 2, text=[None, "heard"], sampling_rate=RATE)
    assert batch["input_ids"].tolist()[1] == [6, 4, 7]
    assert batch["attention_mask"].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_wav_files_and_waveforms(tmp_path):
    wave = 0.5 * np.sin(2 * np.pi * TONE * np.arange(4000) / 8000)
    path = write_wav(tmp_path / "tone.wav")
    batch = processor()(audio=[path, wave], text=["heard"] * 2, sampling_rate=8000)
    assert batch["audio_mask"].sum(1).tolist() == pytest.approx([8000, 8000], abs=64)
    torch.testing.assert_close(batch["input_values"][0], batch["input_values"][1], rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("extractor", "name", "shape", "real"),
    [
        (lambda: ASTFeatureExtractor(max_length=128, num_mel_bins=16), "input_values", (2, 128, 16), 98),
        (lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=2), "input_features", (2, 16, 200), 100),
        (lambda: ClapFeatureExtractor(sampling_rate=RATE, max_length_s=2), "input_features", None, None),
    ],
    ids=["ast", "whisper", "clap"],
)
def test_extractors_that_fill_up_by_themselves(extractor, name, shape, real):
    """The mask goes over the frames of the spectrogram, real as far as the sound goes."""
    wave = np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    batch = processor(audio=extractor())(audio=[wave, None], text=["heard"] * 2, sampling_rate=RATE)
    if shape is not None:
        assert batch[name].shape == shape
        assert batch["audio_mask"].shape == (2, 128 if name == "input_values" else 200)
        assert batch["audio_mask"][0].sum() == real
        assert batch["audio_mask"][0, :real].all()
    else:
        assert batch["audio_mask"].shape == (2, batch[name].shape[-2])
        assert batch["audio_mask"][0].sum() == -(-RATE // 480)  # though the extractor repeats it to the end
    assert not batch["audio_mask"][1].any()


def test_processors_of_whole_videos(tmp_path):
    """Video towers with a fixed number of frames: filled up to it."""
    vision = VideoMAEImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    paths = [write_video(tmp_path / "short.mp4", 2)]
    batch = processor(vision, frame_padding="max_length")(videos=paths, text=["seen"])
    assert batch["pixel_values"].shape == (1, 4, 3, SIDE, SIDE)
    assert batch["frame_mask"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_save_and_load(kind, tmp_path):
    vision = (
        images() if kind == "image" else VideoMAEImageProcessorPil(size={"shortest_edge": SIDE}, do_center_crop=False)
    )
    ours = processor(vision, num_frames=3, frame_padding="max_length")
    path = write_video(tmp_path / "clip.mp4")
    expected = ours(videos=[path], audio="videos", text=["what is heard"])
    ours.save_pretrained(tmp_path / "saved")
    for loaded in (
        TrimodalProcessor.from_pretrained(tmp_path / "saved"),
        AutoProcessor.from_pretrained(tmp_path / "saved"),
    ):
        assert type(loaded) is TrimodalProcessor
        assert (loaded.num_frames, loaded.frame_padding) == (3, "max_length")
        actual = loaded(videos=[path], audio="videos", text=["what is heard"])
        assert set(actual) == set(expected)
        for name, value in expected.items():  # to rounding: with torchvision transformers loads its kind of processor
            torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-6, msg=name)
    assert TrimodalProcessor.from_pretrained(tmp_path / "saved", num_frames=5).num_frames == 5
    with pytest.raises(OSError, match="no trimodal processor"):
        TrimodalProcessor.from_pretrained(tmp_path)


def test_the_processors_of_towers(tmp_path):
    for name, part in (("v", images()), ("a", Wav2Vec2FeatureExtractor()), ("t", tokenizer())):
        part.save_pretrained(tmp_path / name)
    try:
        ours = TrimodalProcessor.from_pretrained_towers(*(str(tmp_path / name) for name in "vat"), num_frames=2)
    except ImportError as error:
        pytest.skip(f"this version of transformers needs torchvision to choose an image processor: {error}")
    batch = ours(videos=[np.zeros((5, 8, 8, 3), np.uint8)], audio=[np.zeros(RATE)], text=["seen"], sampling_rate=RATE)
    assert batch["pixel_values"].shape == (1, 2, 3, SIDE, SIDE)


@torch.no_grad()
def test_batches_fit_the_model(tmp_path):
    """From files to the fused vector; a sample is in a batch what it is alone."""
    model = TrimodalModel.from_pretrained_towers(tower("vit"), tower("wav2vec2"), tower("bert"))
    paths = [write_video(tmp_path / "long.mp4", 8), write_video(tmp_path / "short.mp4", 3)]
    texts = ["what is seen", "heard"]
    together = model(**processor()(videos=paths, audio="videos", text=texts)).pooler_output
    for i in range(2):
        alone = model(**processor()(videos=paths[i : i + 1], audio="videos", text=texts[i : i + 1])).pooler_output
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got nothing"),
        ({"text": ["a"], "audio": [None, None]}, "same number of samples; got {'audio': 2, 'text': 1}"),
        ({"text": "heard"}, "Give a list"),
        ({"audio": [np.zeros(10)]}, "Give the `sampling_rate`"),
        ({"audio": [np.zeros((20, 30))], "sampling_rate": RATE}, r"audio\[0\]: A waveform must be \(samples,\)"),
        ({"audio": "videos", "videos": [np.zeros((1, 8, 8, 3), np.uint8)]}, "needs `videos` that are paths"),
        ({"audio": "track"}, "or 'videos' for"),
        ({"videos": [[]]}, "A video has no frames"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor()(**arguments)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        TrimodalProcessor(text=tokenizer())
    with pytest.raises(ValueError, match="`num_frames` must be at least 1"):
        processor(num_frames=0)
    with pytest.raises(ValueError, match="`frame_padding` must be"):
        processor(frame_padding="shortest")
    with pytest.raises(ValueError, match="no part for audio"):
        TrimodalProcessor(images(), None, tokenizer())(audio=[None], text=["heard"])


def test_without_pyav_only_files_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        processor()(videos=[path], text=["seen"])
    wave = np.zeros(RATE, np.float32)
    assert "input_values" in processor()(audio=[wave], text=["heard"], sampling_rate=RATE)


WITH_TORCHVISION = """
import sys
import common  # torchvision, beside any torch
import numpy as np
import torch
from test_trimodal_processor import tokenizer
from transformers import VideoMAEVideoProcessor, ViTImageProcessor, VJEPA2VideoProcessor
from peft_read import TrimodalProcessor

sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
long = np.stack([np.full((40, 40, 3), 25 * i, np.uint8) for i in range(8)])
for vision in (VideoMAEVideoProcessor(**sizes), VJEPA2VideoProcessor(**sizes), ViTImageProcessor()):
    ours = TrimodalProcessor(vision, None, tokenizer(), num_frames=4)
    ours.save_pretrained(sys.argv[1])
    for processor in (ours, TrimodalProcessor.from_pretrained(sys.argv[1])):
        assert type(processor.vision) is type(vision)
        batch = processor(videos=[long, long[:2]], text=["seen", "heard"])
        assert batch["pixel_values"].shape[:3] == (2, 4, 3), batch["pixel_values"].shape
        assert batch["frame_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        levels = batch["pixel_values"].mean((2, 3, 4))[0].diff()
        assert torch.allclose(levels, levels[0]) and levels[0] > 0.1, levels
print("checked")
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="video processors need torchvision")
def test_processors_of_torchvision(tmp_path):
    """Real video processors, and the image processors that torchvision brings."""
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    run = subprocess.run(
        [sys.executable, "-c", WITH_TORCHVISION, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("checked\n"), run.stderr
