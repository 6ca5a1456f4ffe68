"""Media files of strangers: whatever is wrong with one, the error is a ValueError that names it."""

import os
import struct

import av
import numpy as np
import pytest

from peft_read.trimodal.media import read_frames, read_sound


def wav(rate, samples, channels=1):
    """The bytes of silence."""
    size = 2 * channels * samples
    about = struct.pack("<IHHIIHH", 16, 1, channels, rate, (rate * 2 * channels) & 0xFFFFFFFF, 2 * channels, 16)
    data = b"WAVEfmt " + about + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", 36 + size) + data + bytes(size)


def video():
    """The bytes of a short video."""
    path = "video.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(8):
            frame = np.full((32, 32, 3), 20 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with open(path, "rb") as file:
        return file.read()


def half_a_video():
    whole = video()
    return whole[: len(whole) // 2]


ODD = {
    "empty": lambda: b"",
    "text": lambda: b"some text",
    "a playlist": lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n",
    "files one after the other": lambda: b"ffconcat version 1.0\nfile /etc/hostname\n",
    "cut off": half_a_video,
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize("read", [lambda path: read_frames(path, 4), lambda path: read_sound(path, 16000)])
def test_a_file_that_is_no_media_file_is_named(tmp_path, monkeypatch, content, read):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.mp4"
    path.write_bytes(content())
    with pytest.raises(ValueError, match=r"odd\.mp4 can't be read as a media file"):
        read(path)


def test_a_file_that_isn_t_there_and_a_folder_are_named(tmp_path):
    for read in (lambda path: read_frames(path, 4), lambda path: read_sound(path, 16000)):
        with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
            read(tmp_path / "gone.mp4")
        with pytest.raises(ValueError, match=os.path.basename(tmp_path)):
            read(tmp_path)


@pytest.mark.parametrize("rate", [0, 1, 7, 2**31 - 1])
def test_sound_of_an_odd_rate_is_read_or_named(tmp_path, rate):
    path = tmp_path / "odd.wav"
    path.write_bytes(wav(rate, 2000))
    try:
        sound = read_sound(path, 16000)
    except ValueError as error:
        message = str(error)
    else:
        message = "odd.wav" if sound is None or not sound.any() else "noise"
    assert "odd.wav" in message
