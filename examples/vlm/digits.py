"""The embedded default's data: short videos of handwritten digits, and questions in which order matters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from common.annotations import ANNOTATIONS
from common.embedded import WORDS, Digits, digit_images
from common.files import finished, is_made
from tqdm import tqdm

from .data import Window


FRAMES = 12  # one a second
SIZE = 32  # pixels a side
NOTHING = "nothing"
COUNTS = {"train": 200, "validation": 100, "test": 100}


@dataclass(frozen=True)
class Story:
    """What happens in a video.

    Attributes:
        digits: of its events, in order.
        event_of_frame: the event that each frame shows, -1 where it shows none.
    """

    digits: list[int]
    event_of_frame: np.ndarray

    def words(self, events: list[int] | None = None) -> str:
        """A word for each frame: the digit of these events (of all by default), else "nothing"."""
        return " ".join(
            WORDS[self.digits[event]] if event >= 0 and (events is None or event in events) else NOTHING
            for event in self.event_of_frame
        )

    def events(self, digit: int) -> list[int]:
        """Which events show a digit."""
        return [event for event, shown in enumerate(self.digits) if shown == digit]

    def window(self, event: int) -> Window:
        """Start and end of an event in seconds."""
        frames = np.flatnonzero(self.event_of_frame == event)
        return float(frames[0]), float(frames[-1] + 1)


def make_story(rng: np.random.Generator, *, of_three: bool = False) -> Story:
    """Five or six events of up to three digits, one or two frames each, none twice in a row; if so, one is thrice."""
    while True:
        choice = rng.choice(10, size=3, replace=False)
        digits = [int(rng.choice(choice))]
        for _ in range(int(rng.integers(4, 6))):
            digits.append(int(rng.choice([digit for digit in choice if digit != digits[-1]])))
        if not of_three or max(map(digits.count, digits)) >= 3:
            break
    lengths = rng.integers(1, 3, size=len(digits))
    gaps = rng.multinomial(FRAMES - lengths.sum(), np.full(len(digits) + 1, 1 / (len(digits) + 1)))
    events = [-1] * gaps[0]
    for event, (length, gap) in enumerate(zip(lengths, gaps[1:], strict=True)):
        events += [event] * length + [-1] * gap
    return Story(digits, np.array(events))


def render(rng: np.random.Generator, story: Story, images: Digits) -> np.ndarray:
    """Frames `(frames, height, width, 3)`, uint8: a digit each, or a scrambled one, a little displaced, with noise."""
    zoom = SIZE // 8
    frames = np.zeros((FRAMES, SIZE + 4, SIZE + 4), dtype=np.float32)
    for canvas, event in zip(frames, story.event_of_frame, strict=True):
        pool = images[story.digits[event] if event >= 0 else int(rng.integers(10))]
        image = pool[rng.integers(len(pool))]
        if event < 0:
            image = rng.permutation(image.ravel()).reshape(8, 8)
        row, column = rng.integers(0, 5, size=2)
        canvas[row : row + SIZE, column : column + SIZE] = image.repeat(zoom, 0).repeat(zoom, 1) * rng.uniform(0.7, 1)
    frames = frames[:, 2:-2, 2:-2]
    frames = np.clip(frames + 0.15 * rng.random(frames.shape, dtype=np.float32), 0, 1)
    return np.repeat((255 * frames).astype(np.uint8)[..., None], 3, axis=-1)


def make_dataset(folder: Path, counts: dict[str, int] = COUNTS, seed: int = 100) -> None:
    """Write videos as mp4 with questions for the second of a digit's events, unless they exist."""
    if is_made(folder):
        return
    images = digit_images()
    lines = []
    with finished(folder) as draft:
        (draft / "videos").mkdir()
        for number, (split, count) in enumerate(counts.items()):
            rng = np.random.default_rng(seed + number)
            for index in tqdm(range(count), desc=f"make {split} videos", leave=False):
                story = make_story(rng, of_three=True)
                digit = max(set(story.digits), key=story.digits.count)
                name = f"videos/{split}_{index:03d}.mp4"
                _write_video(draft / name, render(rng, story, images["test" if split == "test" else "train"]))
                second = story.events(digit)[1]
                messages = conversation(f"which frames are the second {WORDS[digit]}?", story.words([second]))
                windows = [story.window(second)]
                lines.append({"video": name, "messages": messages, "relevant_windows": windows, "split": split})
        (draft / ANNOTATIONS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def conversation(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """A question before a video, so that the model knows what to look for, and the answer where there is one."""
    asked = {"role": "user", "content": [{"type": "text", "text": question}, {"type": "video"}]}
    return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]


def parse_marks(text: str) -> list[Window]:
    """The windows in seconds that an answer with a word for each frame marks.

    Example:
        >>> parse_marks("nothing five five nothing five")
        [(1.0, 3.0), (4.0, 5.0)]
    """
    marked = [word in WORDS for word in text.split()]
    edges = np.flatnonzero(np.diff([False, *marked, False]))
    return [(float(start), float(end)) for start, end in edges.reshape(-1, 2)]


def _write_video(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
