"""The embedded default: clips in which real handwritten digits are seen and tones are heard, with questions.

Each frame lasts a quarter of a second. In `short` clips each of 8 frames shows a digit, and three have a low tone and
three a high one. `two_digits` is the same with a digit in both halves of each frame: the question says where to look.
`long` clips have 64 frames in shots of four, most of which don't matter: one frame of each shot shows a digit, half of
the shots have a sound, at any of their frames, and the answers are the digits of the shots with the tone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from common.annotations import ANNOTATIONS
from common.embedded import WORDS, Digits, digit_images
from common.files import finished, is_made
from scipy.ndimage import zoom
from tqdm import tqdm


FRAMES = {"short": 8, "two_digits": 8, "long": 64}
SIZES = {"train": 400, "validation": 200, "test": 400}
LONG_SIZES = {"train": 400, "validation": 100, "test": 200}
SHOT = 4  # frames of a long clip that belong together
FRAME_SECONDS = 0.25
RATE = 16000  # samples a second
HALF = 16  # pixels a side of each half of a frame, before they are doubled
NOTHING = len(WORDS)  # in place of a digit, where there is none
LOW, HIGH, NOISE, SILENCE = range(4)
TONES = {LOW: ("low", 320.0), HIGH: ("high", 2500.0)}  # name and Hz
SIDES = ("left", "right")
QUESTIONS = ("which {digit} at the {tone} tone?", "{tone} tone: what {digit}?", "{digit} at the {tone} tone?")


@dataclass(frozen=True)
class Clip:
    """What happens in a clip.

    Attributes:
        digits: `(frames, 2)`, in the left and in the right half, `NOTHING` where there is none.
        sounds: `(frames,)`, of `LOW`, `HIGH`, `NOISE` and `SILENCE`.
        query: the question.
        answers: `(frames,)`, the digit that it asks for, `NOTHING` in other frames.
    """

    digits: np.ndarray
    sounds: np.ndarray
    query: str
    answers: np.ndarray


def make_clip(rng: np.random.Generator, kind: str) -> Clip:
    """A clip with a question, which asks for at least one frame."""
    asked, side = int(rng.choice([LOW, HIGH])), int(rng.integers(2))
    if kind == "long":
        digits, sounds, heard = _long(rng)
    else:
        digits = _digits_of_frames(rng, FRAMES[kind], both_sides=kind == "two_digits")
        sounds = heard = rng.permutation([LOW] * 3 + [HIGH] * 3 + [NOISE, SILENCE])
    shown = digits[:, side] if kind == "two_digits" else digits.min(1)
    what = f"{SIDES[side]} digit" if kind == "two_digits" else "digit"
    query = QUESTIONS[rng.integers(len(QUESTIONS))].format(digit=what, tone=TONES[asked][0])
    return Clip(digits, sounds, query, np.where(heard == asked, shown, NOTHING))


def _digits_of_frames(rng: np.random.Generator, frames: int, both_sides: bool) -> np.ndarray:
    """Two different digits in every frame, or one in either half."""
    digits = np.stack([rng.choice(10, size=2, replace=False) for _ in range(frames)])
    if not both_sides:
        digits[np.arange(frames), rng.integers(2, size=frames)] = NOTHING
    return digits


def _long(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digits and sounds, of which each shot has one at most, and the sound of each frame's shot."""
    frames = FRAMES["long"]
    shots = frames // SHOT
    digits = _digits_of_frames(rng, frames, both_sides=False)
    shown = np.arange(shots) * SHOT + rng.integers(SHOT, size=shots)
    digits[np.setdiff1d(np.arange(frames), shown)] = NOTHING
    of_shots = rng.permutation([LOW] * 3 + [HIGH] * 3 + [NOISE] * 2 + [SILENCE] * (shots - 8))
    sounds = np.full(frames, SILENCE)
    sounds[np.arange(shots) * SHOT + rng.integers(SHOT, size=shots)] = of_shots
    return digits, sounds, of_shots.repeat(SHOT)


def render_frame(rng: np.random.Generator, digits: np.ndarray, images: Digits) -> np.ndarray:
    """`(height, width, 3)`, uint8: a noisy picture of the digits in its left and right half."""
    frame = np.zeros((HALF, 2 * HALF))
    for side, digit in enumerate(digits):
        if digit != NOTHING:
            image = images[int(digit)][rng.integers(len(images[int(digit)]))]
            half = np.roll(zoom(image, HALF / len(image), order=1), rng.integers(-1, 2, size=2), axis=(0, 1))
            frame[:, side * HALF : (side + 1) * HALF] = half * rng.uniform(0.7, 1)
    frame = np.clip(frame + 0.15 * rng.standard_normal(frame.shape), 0, 1)
    pixels = (255 * frame).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    return np.repeat(pixels[..., None], 3, axis=-1)


def render_sound(rng: np.random.Generator, sounds: np.ndarray) -> np.ndarray:
    """`(samples,)`, float32: what is heard at each frame, somewhere within it, and a faint hiss."""
    length = round(FRAME_SECONDS * RATE)
    wave = 0.03 * rng.standard_normal(len(sounds) * length)
    for frame, sound in enumerate(sounds):
        samples = int(RATE * rng.uniform(0.16, 0.2))
        start = frame * length + rng.integers(length - samples)
        envelope = np.hanning(samples) ** 0.3
        if sound in TONES:
            phase = 2 * np.pi * TONES[sound][1] * rng.uniform(0.88, 1.12) * np.arange(samples) / RATE
            phase += rng.uniform(0, 2 * np.pi)
            tone = np.sin(phase) + rng.uniform(0, 0.4) * np.sin(2 * phase)
            wave[start : start + samples] += rng.uniform(0.15, 0.4) * envelope * tone
        elif sound == NOISE:
            wave[start : start + samples] += rng.uniform(0.1, 0.25) * envelope * rng.standard_normal(samples)
    return wave.astype(np.float32)


def make_dataset(folder: Path, kind: str, seed: int = 0) -> None:
    """Write clips as mp4 files with a sound track, with annotations, unless they exist.

    Args:
        folder: where to.
        kind: a key of `FRAMES`.
        seed: of the training and validation clips; test clips, of other images, are always the same.
    """
    if is_made(folder):
        return
    images = digit_images()
    lines = []
    with finished(folder) as draft:
        (draft / "clips").mkdir()
        for number, (split, count) in enumerate((LONG_SIZES if kind == "long" else SIZES).items()):
            rng = np.random.default_rng((number, 0 if split == "test" else seed))
            pool = images["test" if split == "test" else "train"]
            for index in tqdm(range(count), desc=f"make {split} clips", leave=False):
                clip = make_clip(rng, kind)
                name = f"clips/{split}_{index:03d}.mp4"
                frames = np.stack([render_frame(rng, digits, pool) for digits in clip.digits])
                write_clip(draft / name, frames, render_sound(rng, clip.sounds))
                answers = [
                    [frame * FRAME_SECONDS, (frame + 1) * FRAME_SECONDS, WORDS[clip.answers[frame]]]
                    for frame in np.flatnonzero(clip.answers != NOTHING).tolist()
                ]
                lines.append({"video": name, "query": clip.query, "answers": answers, "split": split})
        (draft / ANNOTATIONS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_clip(path: Path, frames: np.ndarray, sound: np.ndarray) -> None:
    """Write frames `(frames, height, width, 3)`, uint8, and sound `(samples,)` into one file."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=round(1 / FRAME_SECONDS))
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.options = {"crf": "18", "preset": "veryfast", "threads": "1"}
        audio = container.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        samples.sample_rate = RATE
        container.mux(audio.encode(samples))
        container.mux(audio.encode())
