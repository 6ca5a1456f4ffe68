"""Media files with known contents: a shade that tells the time, a tone at known seconds."""

from fractions import Fraction

import av
import numpy as np


RATE, SIDE = 16_000, 32
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
):
    """A file whose pictures begin at these seconds, each of the shade of its time, and which has a sound track.

    Args:
        begins: when each picture begins; at `fps` by default.
        images: pictures in place of shades.
        sound: `(channels, samples)`, None for no track.
    """
    if begins is None:
        begins = [index / fps for index in range(round(length * fps))]
    ticks = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        if begins:
            video = container.add_stream(codec, rate=1000)
            video.height, video.width, video.pix_fmt = size[0], size[1], "yuv420p"
            video.codec_context.time_base = ticks
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
