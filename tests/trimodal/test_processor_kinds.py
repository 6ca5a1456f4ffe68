"""Every kind of picture and sound that other processors take, and what none can read right."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_files import RATE, SIDE, tone, write
from PIL import Image
from test_trimodal_processor import images, processor, tokenizer
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from peft_read import TrimodalProcessor


pytestmark = pytest.mark.filterwarnings("ignore:.*(torchvision|torchaudio|mel filter).*")
RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
WAVE = (0.5 * np.sin(np.arange(RATE) / 10)).astype(np.float32)
CHW = torch.from_numpy(VIDEO).permute(0, 3, 1, 2)
GREY = np.repeat(VIDEO[..., :1], 3, -1)
DARK = VIDEO.astype(np.float32)
DARK[0] /= 255  # of floats up to 255 one frame that has none above 1
DARK_BYTES = DARK.round().astype(np.uint8)
OVERSHOT = (VIDEO / 255).astype(np.float32)
OVERSHOT[VIDEO == 255] = 1.02
DEEP = (VIDEO[0, ..., 0].astype(np.uint16) + 1) * 256 - 1
VIDEOS = {
    "channels last": (VIDEO, VIDEO),
    "channels first": (VIDEO.transpose(0, 3, 1, 2), VIDEO),
    "tensor": (CHW, VIDEO),
    "tensor, channels last": (torch.from_numpy(VIDEO), VIDEO),
    "floats in 0..1": ((VIDEO / 255).astype(np.float32), VIDEO),
    "tensor of floats in 0..1": (CHW / 255.0, VIDEO),
    "bfloat16 in 0..255": (CHW.bfloat16(), VIDEO),
    "floats in 0..255": (VIDEO.astype(np.float64), VIDEO),
    "int64": (VIDEO.astype(np.int64), VIDEO),
    "grey": (VIDEO[..., 0], GREY),
    "grey with an axis": (VIDEO[..., :1], GREY),
    "four channels": (np.concatenate([VIDEO, VIDEO[..., :1]], -1), VIDEO),
    "images": ([Image.fromarray(frame) for frame in VIDEO], VIDEO),
    "grey images": ([Image.fromarray(frame[..., 0]) for frame in VIDEO], GREY),
    "images with transparency": ([Image.fromarray(frame).convert("RGBA") for frame in VIDEO], VIDEO),
    "list of arrays": (list(VIDEO), VIDEO),
    "list of tensors": (list(CHW), VIDEO),
    "floats that overshoot": (OVERSHOT, VIDEO),
    "list of floats, one of them dark": (list(DARK), DARK_BYTES),
    "list of tensors of floats, one of them dark": (list(torch.from_numpy(DARK)), DARK_BYTES),
    "images of floats": ([Image.fromarray(frame) for frame in DARK[..., 0]], np.repeat(DARK_BYTES[..., :1], 3, -1)),
    "images of 32 bits": ([Image.fromarray(frame.astype(np.int32)) for frame in VIDEO[..., 0]], GREY),
    "images of 16 bits": ([Image.fromarray(frame.astype(np.uint16)) for frame in VIDEO[..., 0]], GREY),
    "one image": (Image.fromarray(VIDEO[0]), VIDEO[:1]),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_kinds_of_videos(kind):
    given, expected = VIDEOS[kind]
    batch = processor()(videos=[given], text=["seen"], num_frames=len(expected))
    wanted = torch.from_numpy(expected).movedim(-1, 1) / 255
    tolerance = 2 / 255 if "bfloat16" in kind else 1e-6
    torch.testing.assert_close(batch["pixel_values"][0], wanted, rtol=0, atol=tolerance)


def test_images_on_disk_and_as_they_were_held(tmp_path):
    """A list of paths; a photo whose camera was turned."""
    image = Image.fromarray(VIDEO[0])
    image.save(tmp_path / "a.png")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    batch = processor()(videos=[[str(tmp_path / "a.png"), tmp_path / "turned.png"]], text=["seen"])
    shown = (batch["pixel_values"][0] * 255).round().byte().movedim(1, -1).numpy()
    assert np.array_equal(shown[0], VIDEO[0])
    assert np.array_equal(shown[1], np.rot90(VIDEO[0], -1))


def test_floats_of_a_list_are_measured_by_all_of_them():
    """By those, too, that aren't sampled."""
    dark = [np.ones((SIDE, SIDE, 3))] * 3
    batch = processor()(videos=[[*dark, np.full((SIDE, SIDE, 3), 200.0)], dark], text=["a"] * 2, num_frames=1)
    assert (batch["pixel_values"].flatten(1) * 255).mean(1).tolist() == pytest.approx([1, 255])


def test_a_file_of_16_bits_is_refused(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"videos\[0\]: .*got (uint16|int32) from .* to 65535.*16 bits"):
        processor()(videos=[[tmp_path / "deep.png"]], text=["seen"])


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (CHW.float() / 127.5 - 1, ValueError, r"floats in \[0, 1\] or \[0, 255\], got float32 from -1 to 1"),
        (VIDEO.astype(np.int64) * 9, ValueError, r"integers up to 255"),
        (OVERSHOT * 1.2, ValueError, r"in \[0, 1\] or in \[0, 255\], got float32 up to 1.224, which may be either"),
        (list(OVERSHOT * 1.2), ValueError, "up to 1.224, which may be either"),
        ([DEEP], ValueError, "Scale those of 16 bits to 8"),
        ([Image.fromarray(DEEP)], ValueError, "Scale those of 16 bits to 8"),
        ([Image.fromarray(DEEP.astype(np.int32))], ValueError, "Scale those of 16 bits to 8"),
        ([Image.fromarray(DEEP.astype(np.float32))], ValueError, "got float32 from .* to 65535"),
        (np.full((2, 8, 8, 3), np.nan), ValueError, "got float64 from nan"),
        (np.zeros((2, 5, 8, 8)), ValueError, r"got shape \(2, 5, 8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"got shape \(3, 8, 8\)"),
        ([], ValueError, "A video has no frames"),
        (3, TypeError, "A video must be a path"),
        ({"frames": 3}, ValueError, "needs `path` or `bytes`"),
    ],
)
def test_pictures_that_nobody_can_read_right_are_refused(video, error, message):
    with pytest.raises(error, match=rf"videos\[1\]: .*{message}"):
        processor()(videos=[VIDEO, video], text=["seen", "heard"])


class Decoder:
    """As torchcodec's decoder of videos."""

    metadata = SimpleNamespace(begin_stream_seconds=1.0, end_stream_seconds=4.0)

    def __len__(self):
        return len(VIDEO)

    def get_frames_played_at(self, seconds):
        index = [int((second - 1.0) * 2) for second in seconds]
        return SimpleNamespace(data=CHW[index])


def test_torchcodec():
    """Its decoders, and what they give."""
    times = torch.arange(6) / 2 + 1
    batch = SimpleNamespace(data=CHW, pts_seconds=times, duration_seconds=torch.full((6,), 0.5))
    made = processor()(videos=[Decoder(), batch], text=["seen"] * 2, num_frames=3)
    expected = CHW[[1, 3, 5]] / 255
    torch.testing.assert_close(made["pixel_values"], torch.stack([expected, expected]), rtol=0, atol=1e-6)
    assert made["frame_times"][0].tolist() == [[1, 2], [2, 3], [3, 4]]
    assert made["frame_times"][1, 0, 0] == 1.5
    assert made["frame_times"][1, 2, 1] == 4.0
    samples = SimpleNamespace(data=torch.from_numpy(WAVE)[None], sample_rate=RATE, pts_seconds=2.0)
    decoder = SimpleNamespace(get_all_samples=lambda: samples)
    heard = processor()(audio=[samples, decoder], text=["heard"] * 2)
    assert torch.equal(heard["input_values"][0], heard["input_values"][1])
    assert heard["audio_times"][:, 0].tolist() == [2.0, 2.0]


SOUNDS = {
    "floats": WAVE,
    "tensor": torch.from_numpy(WAVE),
    "list": WAVE.tolist(),
    "one channel first": torch.from_numpy(WAVE)[None],
    "one channel last": WAVE[:, None],
    "stereo first": np.stack([WAVE, WAVE]),
    "stereo last": np.stack([WAVE, WAVE], 1),
    "int16": (WAVE * 32768).round().astype(np.int16),
    "int32": (WAVE.astype(np.float64) * 2**31).astype(np.int32),
    "stereo int16": torch.from_numpy((WAVE * 32768).round().astype(np.int16)).expand(2, -1),
    "double": WAVE.astype(np.float64),
    "half": torch.from_numpy(WAVE).half(),
    "pair": (WAVE, RATE),
    "dict": {"array": WAVE, "sampling_rate": RATE, "path": None},
    "dict of tensors": {"array": torch.from_numpy(WAVE), "sampling_rate": torch.tensor(RATE)},
    "dict as of pipelines": {"raw": WAVE, "sampling_rate": RATE},
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_kinds_of_sounds(kind):
    batch = processor()(audio=[SOUNDS[kind]], text=["heard"], sampling_rate=RATE)
    torch.testing.assert_close(batch["input_values"][0], torch.from_numpy(WAVE), rtol=0, atol=1e-3)


def test_undecoded_dicts_bytes_and_open_files(tmp_path):
    """As `datasets` gives them without decoding: by path, by content; a video's own sound from any of them."""
    path = write(tmp_path / "clip.mp4", sound=tone(4.0, [(1, 2)]))
    data = open_bytes(path)
    kinds = [path, {"path": path, "bytes": None}, {"path": "gone.mp4", "bytes": data}, data, io.BytesIO(data)]
    batch = processor()(videos=kinds, audio="videos", text=["seen"] * len(kinds))
    for name in ("pixel_values", "input_values", "frame_times", "audio_times"):
        assert all(torch.equal(row, batch[name][0]) for row in batch[name]), name
    assert torch.equal(batch["input_values"], processor()(audio=kinds, text=["heard"] * 5)["input_values"])


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("sound", "error", "message"),
    [
        (WAVE * 32768, ValueError, r"must lie in \[-1, 1\], got values up to 163"),
        (WAVE * np.nan, ValueError, "got values up to nan"),
        ((WAVE * 100).astype(np.int64), ValueError, "got int64"),
        (np.zeros((300, 400)), ValueError, r"got shape \(300, 400\)"),
        (np.zeros((1, 2, 400)), ValueError, r"got shape \(1, 2, 400\)"),
        ({"samples": WAVE}, ValueError, "needs `array` and `sampling_rate`"),
        (7, TypeError, "Sound must be a path"),
    ],
)
def test_sounds_that_nobody_can_read_right_are_refused(sound, error, message):
    with pytest.raises(error, match=rf"audio\[1\]: .*{message}"):
        processor()(audio=[WAVE, sound], text=["heard"] * 2, sampling_rate=RATE)


def test_rates_of_each_sample():
    batch = processor()(audio=[WAVE, WAVE, None], text=["a"] * 3, sampling_rate=[RATE, RATE // 2, None])
    assert batch["audio_mask"].sum(1).tolist() == [RATE, pytest.approx(2 * RATE, abs=64), 0]
    with pytest.raises(ValueError, match="`sampling_rate` has 1 values for 2 samples"):
        processor()(audio=[WAVE, WAVE], text=["a"] * 2, sampling_rate=[RATE])


@pytest.mark.parametrize("rate", [True, 0, -RATE, 8000.5, np.nan, np.inf, "16000", 2**31 - 1])
def test_rates_that_are_none_are_refused(rate):
    """However they are given."""
    message = "`sampling_rate` must be a whole number of samples a second"
    for sound in ((WAVE, rate), {"array": WAVE, "sampling_rate": rate}):
        with pytest.raises(ValueError, match=rf"audio\[0\]: .*{message}"):
            processor()(audio=[sound], text=["a"])
    for given in (rate, [rate]):
        with pytest.raises(ValueError, match=message):
            processor()(audio=[WAVE], text=["a"], sampling_rate=given)


@pytest.mark.parametrize("fps", [True, 0, -1, 0.0, np.nan, np.inf, 1e-320, 1e-30, "25"])
def test_frame_rates_that_are_none_are_refused(fps):
    for given in (fps, [fps]):
        with pytest.raises(ValueError, match="`fps` must be a number of frames a second"):
            processor()(videos=[VIDEO], text=["a"], fps=given)


@pytest.mark.parametrize("count", [True, 2.5, "4", 0, -1, np.nan])
def test_numbers_of_frames_that_are_none_are_refused(count):
    for make in (lambda: processor(num_frames=count), lambda: processor()([VIDEO], text=["a"], num_frames=count)):
        with pytest.raises(ValueError, match="`num_frames` must be at least 1, a whole number"):
            make()


def test_numbers_of_numpy_and_torch_are_numbers():
    one = processor()([VIDEO], [WAVE], ["a"], sampling_rate=np.int64(RATE), fps=np.float32(2), num_frames=np.int64(3))
    each = processor()([VIDEO], [WAVE], ["a"], sampling_rate=float(RATE), fps=torch.tensor([2]), num_frames=3)
    assert all(torch.equal(one[name], each[name]) for name in one)
    assert processor(num_frames=np.int64(3)).num_frames.__class__ is int


@pytest.mark.parametrize("rate", [RATE, 2 * RATE, RATE // 2, 44100])
def test_a_loud_waveform_stays_as_loud_at_any_rate(rate):
    wave = 1.5 * np.sin(2 * np.pi * 200 * np.arange(rate) / rate)
    heard = processor()(audio=[wave], text=["a"], sampling_rate=rate)["input_values"][0, RATE // 4 : RATE // 2]
    expected = 1.5 * np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE)[RATE // 4 : RATE // 2]
    np.testing.assert_allclose(heard, expected, atol=0.02)


@pytest.mark.parametrize("samples", [0, 1, 10])
@pytest.mark.parametrize(
    "extractor",
    [
        lambda: ASTFeatureExtractor(max_length=128, num_mel_bins=16),
        lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=2),
        lambda: ClapFeatureExtractor(sampling_rate=RATE, max_length_s=2),
        Wav2Vec2FeatureExtractor,
    ],
    ids=["ast", "whisper", "clap", "wav2vec2"],
)
def test_hardly_any_sound(extractor, samples):
    """None at all isn't there; a few samples are something, for a step at least."""
    batch = processor(audio=extractor())(audio=[WAVE[:samples], WAVE], text=["a"] * 2, sampling_rate=RATE)
    heard = int(batch["audio_mask"][0].sum())
    assert (heard == 0) == (samples == 0)
    assert heard <= max(1, samples)
    assert batch[next(name for name in batch if name.startswith("input_"))].isfinite().all()


def test_options_of_the_call():
    ours = processor()
    assert ours(videos=[VIDEO], text=["seen"], num_frames=2)["pixel_values"].shape[1] == 2
    assert ours(videos=[VIDEO], text=["what is seen"], max_length=2)["input_ids"].shape == (1, 2)
    as_arrays = ours(videos=[VIDEO], audio=[WAVE], text=["seen"], sampling_rate=RATE, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in as_arrays.values())
    with pytest.raises(TypeError, match="there is no `images`"):
        ours(images=[VIDEO], text=["seen"])
    with pytest.raises(TypeError, match=r"`frames` is no option of a TrimodalProcessor, nor of its"):
        ours(videos=[VIDEO], text=["seen"], frames=2)
    with pytest.raises(ValueError, match="`return_tensors` must be 'pt' or 'np'"):
        ours(videos=[VIDEO], text=["seen"], return_tensors="tf")
    with pytest.raises(ValueError, match="`num_frames` must be at least 1"):
        ours(videos=[VIDEO], text=["seen"], num_frames=0)


def test_a_tokenizer_without_a_pad_token_is_told_how():
    text = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, eos_token="[UNK]")
    ours = TrimodalProcessor(images(), None, text)
    with pytest.raises(ValueError, match=r"processor\.text\.pad_token = processor\.text\.eos_token"):
        ours(videos=[VIDEO], text=["seen"])
    ours.text.pad_token = ours.text.eos_token
    batch = ours(videos=[VIDEO] * 2, text=["seen", "what is seen"])
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_times_of_frames_without_a_file():
    """By their rate; else evenly over their sound; else one after the other."""
    ours = processor(num_frames=3)
    by_rate = ours(videos=[VIDEO, VIDEO], text=["a"] * 2, fps=[2, 4])["frame_times"]
    assert by_rate.tolist() == [[[0, 1], [1, 2], [2, 3]], [[0, 0.5], [0.5, 1], [1, 1.5]]]
    over_sound = ours(videos=[VIDEO], audio=[np.tile(WAVE, 6)], text=["a"], sampling_rate=RATE)["frame_times"]
    assert over_sound.tolist() == [[[0, 2], [2, 4], [4, 6]]]
    assert ours(videos=[VIDEO], text=["a"])["frame_times"].tolist() == [[[0, 1], [1, 2], [2, 3]]]


HEARS = {
    "ast": (lambda: ASTFeatureExtractor(max_length=200, num_mel_bins=16), 2.0, (200, 16), 0.01),
    "whisper": (lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=2), 2.0, (16, 200), 0.01),
    "clap": (lambda: ClapFeatureExtractor(sampling_rate=RATE, max_length_s=2), 2.0, None, 480 / RATE),
    "fused clap": (
        lambda: ClapFeatureExtractor(sampling_rate=RATE, max_length_s=2, truncation="fusion"),
        2.0,
        None,
        480 / RATE,
    ),
    "wav2vec2": (Wav2Vec2FeatureExtractor, 2.0, (2 * RATE,), 1 / RATE),
}


@pytest.mark.parametrize("kind", HEARS)
def test_long_sound_comes_in_segments(kind):
    """As long as the tower hears, each at its second and as it is alone, always the same; beside a short sound."""
    make, seconds, shape, step = HEARS[kind]
    ours = processor(audio=make(), segment_seconds=seconds if kind == "wav2vec2" else None)
    name = ours.audio.model_input_names[0]
    long = RNG.normal(size=5 * RATE).astype(np.float32) / 8
    make_batch = lambda: ours(audio=[long, long[: RATE // 2], None], text=["a"] * 3, sampling_rate=RATE)  # noqa: E731
    batch = make_batch()
    assert torch.equal(batch[name], make_batch()[name])
    assert batch[name].shape[:2] == (3, 3)
    assert shape is None or batch[name].shape[2:] == shape
    assert batch["audio_mask"].shape[:2] == (3, 3)
    assert batch["audio_times"][0].tolist() == [[pytest.approx(seconds * i), pytest.approx(step)] for i in range(3)]
    real = (batch["audio_mask"] * step).sum(2)
    assert real[0].tolist() == pytest.approx([2, 2, 1], abs=2.1 * max(step, 0.01))
    assert real[1].tolist() == pytest.approx([0.5, 0, 0], abs=2.1 * max(step, 0.01))
    assert not batch["audio_mask"][2].any()
    alone = ours(audio=[long[4 * RATE :]], text=["a"], sampling_rate=RATE)[name][0]
    length = alone.shape[0] if kind == "wav2vec2" else None
    torch.testing.assert_close(batch[name][0, 2][:length], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`segment_seconds` must be positive"):
        processor(audio=make(), segment_seconds=0.0 if kind == "wav2vec2" else 3.0)


def test_a_codecs_padding_is_no_segment():
    batch = processor(audio=ASTFeatureExtractor(max_length=200, num_mel_bins=16))(
        audio=[np.zeros(round(2.1 * RATE), np.float32)], text=["a"], sampling_rate=RATE
    )
    assert batch["input_values"].shape == (1, 200, 16)
    assert batch["audio_mask"].all()
