"""Small media files whose content is known, and a tokenizer of a few words."""

from fractions import Fraction

import av
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


RATE, FPS, SIDE = 16_000, 8, 32
# Too loud to be lost in encoding.
TONE = 440.0


def write_video(path, frames=8, sound=True, silent_until=0.0):
    """A clip whose frame i is all of grey level 25 i, with a tone on its track."""
    seconds = frames / FPS
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=FPS)
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for i in range(frames):
            image = np.full((SIDE, SIDE, 3), 25 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            times = np.arange(int(seconds * RATE)) / RATE
            wave = np.where(times >= silent_until, 0.5 * np.sin(2 * np.pi * TONE * times), 0).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return str(path)


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
