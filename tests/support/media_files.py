"""Media files with known contents: a shade that tells the time, a tone at known seconds; and a tokenizer."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


RATE, FPS, SIDE = 16_000, 8, 32
# Hz of the tone of `write_video` and `write_wav`.
TONE = 440.0
# A tone's peak: too loud to be lost in encoding.
PEAK = 0.5


def shade(seconds, length):
    """The grey level of a picture that is shown at a time of a clip."""
    return round(240 * seconds / length)


def seconds_of(image, length):
    """When a picture was shown, of its grey level."""
    return float(np.asarray(image, np.float64).mean()) * length / 240


def tone(length, marks, rate=RATE, channels=1):
    """`(channels, samples)`: silence, but for tones of 1000 Hz from `start` to `end` for each of `marks`."""
    times = np.arange(round(length * rate)) / rate
    wave = np.zeros_like(times)
    for start, end in marks:
        inside = (times >= start) & (times < end)
        wave[inside] = PEAK * np.sin(2 * np.pi * 1000 * times[inside])
    return np.repeat(wave[None].astype(np.float32), channels, 0)


def write(
    path,
    begins=None,
    length=4.0,
    *,
    fps=10,
    images=None,
    sound=None,
    rate=RATE,
    layout="mono",
    sound_start=0.0,
    size=(SIDE, SIDE),
    codec="mpeg4",
    audio_codec="aac",
    pixel=None,
):
    """A file whose pictures begin at these seconds, each of the shade of its time, and which has a sound track.

    Args:
        begins: when each picture begins; at `fps` by default.
        images: pictures in place of shades.
        sound: `(channels, samples)`, None for no track.
        pixel: a pixel's width by its height; square by default.
    """
    if begins is None:
        begins = [index / fps for index in range(round(length * fps))]
    ticks = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        if begins:
            video = container.add_stream(codec, rate=1000)
            video.height, video.width, video.pix_fmt = size[0], size[1], "yuv420p"
            video.codec_context.time_base = ticks
            if pixel is not None:
                video.codec_context.sample_aspect_ratio = pixel
            if codec == "mpeg4":
                video.codec_context.qmax = 3
        if sound is not None:
            audio = container.add_stream(audio_codec, rate=rate, layout=layout)
        for index, begin in enumerate(begins):
            image = np.full((*size, 3), shade(begin, length), np.uint8) if images is None else images[index]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(begin * 1000), ticks
            container.mux(video.encode(frame))
        if begins:
            container.mux(video.encode())
        if sound is not None:
            resampler = av.AudioResampler(format=audio.codec_context.format.name, layout=layout, rate=rate)
            for start in range(0, sound.shape[1], 1024):
                part = np.ascontiguousarray(sound[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = start + round(sound_start * rate)
                for ready in resampler.resample(frame):
                    container.mux(audio.encode(ready))
            container.mux(audio.encode())
    return str(path)


def turned(path, matrix):
    """The file, of MP4, with `a, b, c, d` of this matrix by which it is to be shown."""
    data = bytearray(Path(path).read_bytes())
    header = data.find(b"tkhd")
    place = header + 4 + (40 if data[header + 4] == 0 else 52)
    a, b, c, d = (entry << 16 for entry in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(data)
    return path


def write_video(path, frames=8, sound=True, silent_until=0.0):
    """A clip whose frame i is all of grey level 25 i, with a tone on its track."""
    times = np.arange(int(frames / FPS * RATE)) / RATE
    wave = np.where(times >= silent_until, PEAK * np.sin(2 * np.pi * TONE * times), 0)[None].astype(np.float32)
    images = [np.full((SIDE, SIDE, 3), 25 * i, np.uint8) for i in range(frames)]
    return write(path, length=frames / FPS, fps=FPS, images=images, sound=wave if sound else None)


def write_wav(path, seconds=0.5, rate=8000):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        wave = (0.5 * np.sin(2 * np.pi * TONE * np.arange(int(seconds * rate)) / rate) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "what", "is", "heard", "seen"])}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
