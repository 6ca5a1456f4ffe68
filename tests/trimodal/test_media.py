"""Media files by their time stamps: which frames are taken, for which seconds, and when sound is heard."""

import io
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from common.annotations import decode_clips
from media_files import PEAK, RATE, SIDE, seconds_of, tone, turned, write

from peft_read.trimodal.media import decode_frames, decode_sound, read_frames, resample


def heard(sound, rate=RATE):
    """The seconds at which a tone begins and ends."""
    loud = np.flatnonzero(np.abs(sound.samples) > PEAK / 2)
    return sound.start + loud[0] / rate, sound.start + loud[-1] / rate


VARIABLE = [0.05 * i for i in range(20)] + [1 + 0.45 * i for i in range(20)]
CASES = {
    "constant": ([0.1 * i for i in range(100)], 10.0),
    "variable": (VARIABLE, 10.0),
    "still, then fast": ([0.0, *(9 + 0.04 * i for i in range(25))], 10.0),
    "late": ([2 + 0.1 * i for i in range(80)], 10.0),
}


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("case", CASES)
def test_frames_are_those_shown_in_the_middle_of_equal_parts(case, ending, tmp_path):
    """Against the definition: of each part's middle the last picture that began before it."""
    begins, end = CASES[case]
    path = write(tmp_path / f"clip.{ending}", begins, end)
    frames = decode_frames(path, 8)
    first = begins[0]
    borders = [first + (end - first) * part / 8 for part in range(9)]
    np.testing.assert_allclose(frames.times, list(pairwise(borders)), atol=0.06)
    for image, (start, stop) in zip(frames.images, frames.times, strict=True):
        shown = max(begin for begin in begins if begin <= (start + stop) / 2 + 1e-6)
        assert abs(seconds_of(image, end) - shown) < 0.12
    assert read_frames(path, 8).shape == (8, SIDE, SIDE, 3)


def test_all_frames_of_a_short_video_have_their_own_time(tmp_path):
    """A picture that stands for nine seconds counts for nine seconds."""
    frames = decode_frames(write(tmp_path / "clip.mp4", [0.0, 9.0, 9.5], 10.0), 8)
    assert len(frames.images) == 3
    np.testing.assert_allclose(frames.times, [[0, 9], [9, 9.5], [9.5, 10]], atol=0.01)


def test_frames_found_by_seeking_are_those_found_one_by_one(tmp_path):
    """In a long file with key frames far apart and pictures that are sorted otherwise than they are stored."""
    path = write(tmp_path / "long.mkv", length=60.0, fps=12, codec="libx264")
    frames = decode_frames(path, 7)
    for image, (start, stop) in zip(frames.images, frames.times, strict=True):
        assert abs(seconds_of(image, 60.0) - (start + stop) / 2) < 0.6


TURNED = {
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "mirrored, 90": (0, 1, 1, 0),
    "mirrored, 270": (0, -1, -1, 0),
}


@pytest.mark.parametrize("how", TURNED)
def test_a_phones_video_is_upright(how, tmp_path):
    """As a player shows it: turned clockwise, and mirrored, by what the file says; against the matrix's definition."""
    picture = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    picture[: SIDE // 2, :SIDE] = 255  # the upper left quarter
    path = write(tmp_path / "clip.mp4", images=[picture] * 8, length=0.8, size=picture.shape[:2])
    image = read_frames(turned(path, TURNED[how]), 1)[0]
    a, b, c, d = TURNED[how]
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    expected = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    expected[down - down.min(), across - across.min()] = picture
    if how.isdigit():
        assert np.array_equal(expected, np.rot90(picture, -int(how) // 90))
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 10


@pytest.mark.parametrize(
    ("suffix", "how"), [(".mp4", None), (".mkv", None), (".mp4", (0, 1, -1, 0))], ids=["mp4", "mkv", "mp4, turned"]
)
def test_pixels_that_are_not_square(suffix, how, tmp_path):
    """A disc that was recorded with pixels of two by one is a disc, as a player shows it, and not an ellipse."""
    y, x = np.mgrid[:SIDE, : SIDE // 2]
    inside = (y + 0.5 - SIDE / 2) ** 2 + (2 * x + 1 - SIDE / 2) ** 2 < (SIDE / 4) ** 2
    picture = np.repeat((255 * inside[..., None]).astype(np.uint8), 3, axis=2)
    path = write(
        tmp_path / f"clip{suffix}", images=[picture] * 8, length=0.8, size=picture.shape[:2], pixel=Fraction(2)
    )
    image = read_frames(path if how is None else turned(path, how), 1)[0]
    assert image.shape == (SIDE, SIDE, 3)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5 - SIDE / 2
    expected = 255.0 * (y**2 + x**2 < (SIDE / 4) ** 2)
    assert np.abs(image.mean(-1) - expected).mean() < 20
    (frame,) = decode_clips(Path(path), 0.8)
    assert np.abs(frame.mean(-1) - expected).mean() < 20


def test_a_last_picture_after_a_long_one_ends_soon(tmp_path):
    """A file that doesn't say for how long it is shown: as long as the others, not as the long one."""
    frames = decode_frames(write(tmp_path / "clip.mkv", [i / 10 for i in range(30)] + [11.9], 12.0), 6)
    np.testing.assert_allclose(frames.times[-1], [10, 12], atol=0.01)


@pytest.mark.parametrize(
    ("layout", "channels"), [("mono", 1), ("stereo", 2), ("5.1", 6)], ids=["mono", "stereo", "surround"]
)
@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_loudness_is_that_of_one_channel(layout, channels, rate, tmp_path):
    """The same tone in all channels is as loud as in one, within [-1, 1] at full scale."""
    wave = tone(2.0, [(0.5, 1.5)], rate, channels)
    sound = decode_sound(write(tmp_path / "a.mkv", [], sound=wave, rate=rate, layout=layout), RATE)
    middle = sound.samples[RATE * 3 // 4 : RATE * 5 // 4]
    assert np.sqrt(2 * (middle**2).mean()) == pytest.approx(PEAK, rel=0.03)
    start, end = heard(sound)
    assert (start, end) == (pytest.approx(0.5, abs=0.05), pytest.approx(1.5, abs=0.05))
    loud = decode_sound(write(tmp_path / "loud.mkv", [], sound=1.98 * wave, rate=rate, layout=layout), RATE)
    assert 0.9 < np.abs(loud.samples).max() <= 1.0


def test_less_than_a_sample_is_none():
    assert resample(np.ones(20, np.float32), 10_000_000, RATE).shape == (0,)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_late_sound_is_late(ending, tmp_path):
    path = write(tmp_path / f"clip.{ending}", sound=tone(2.0, [(0.5, 1.5)]), sound_start=2.0)
    sound = decode_sound(path, RATE)
    assert sound.start == pytest.approx(2.0, abs=0.1)
    assert heard(sound) == (pytest.approx(2.5, abs=0.05), pytest.approx(3.5, abs=0.05))


def test_files_in_memory(tmp_path):
    path = write(tmp_path / "clip.mp4", sound=tone(4.0, [(1, 2)]))
    source = io.BytesIO(Path(path).read_bytes())
    assert np.array_equal(np.stack(decode_frames(source, 4).images), read_frames(path, 4))
    assert np.array_equal(decode_sound(source, RATE).samples, decode_sound(path, RATE).samples)


def test_a_cover_is_no_video(tmp_path):
    with pytest.raises(ValueError, match=r"a\.wav has no video track"):
        decode_frames(write(tmp_path / "a.wav", [], sound=tone(1.0, []), audio_codec="pcm_s16le"), 2)


@pytest.mark.parametrize("spoilt", ["empty", "cut", "text", "folder", "missing"])
def test_what_is_wrong_with_a_file_names_it(spoilt, tmp_path):
    path = tmp_path / "broken.mp4"
    whole = Path(write(tmp_path / "whole.mp4", sound=tone(4.0, []))).read_bytes()
    if spoilt == "folder":
        path.mkdir()
    elif spoilt != "missing":
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no video\n" * 200}[spoilt])
    for read in (lambda: decode_frames(path, 4), lambda: decode_sound(path, RATE)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"broken\.mp4"):
            read()
