"""Questions about videos with their answers, from a folder of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.annotations import is_span, read_entries


Window = tuple[float, float]
Message = dict[str, Any]
# What a line may hold beside `video` and `split`: exactly one of these fields, and what goes with it.
KINDS = {"query": "relevant_windows", "question": "answer", "caption": None, "messages": None}
PROMPTS = {
    "query": "At which seconds does the video show this: {text}?",
    "question": "{text}",
    "caption": "Describe what happens in the video.",
}
ANSWER = "from {start:.1f} to {end:.1f} seconds"


@dataclass(frozen=True)
class Sample:
    """One question about one video.

    Attributes:
        video: path of the video file.
        split: `"train"`, `"validation"` or `"test"`.
        kind: which field of the line it was made of, a key of `KINDS`.
        messages: the conversation up to the answer, with one `{"type": "video"}` in its contents.
        answer: what the model is to say; None where it has to say it by itself.
        windows: the true `(start, end)` in seconds, where the line has them.
        line: `path:line` of the annotation, for messages.
    """

    video: Path
    split: str
    kind: str
    messages: list[Message]
    answer: str | None
    windows: list[Window] | None
    line: str

    @property
    def question(self) -> str:
        """The last text before the answer."""
        content = self.messages[-1]["content"]
        parts = [content] if isinstance(content, str) else [item.get("text", "") for item in content]
        return next((part.strip() for part in reversed(parts) if part.strip()), "")

    def without_answer(self) -> Sample:
        """The same question, for the model to answer."""
        return replace(self, answer=None)


def read_samples(folder: Path, prompt: str | None = None, answer: str = ANSWER) -> list[Sample]:
    """Read `annotations.jsonl` of a data folder.

    Each line is an object with `video` (a path relative to the folder), `split`, and one of: `query` with
    `relevant_windows` (pairs of seconds); `question` with `answer`; `caption`; `messages`, whose last one is the
    assistant's and which hold one `{"type": "video"}`. Lines of every kind may have `relevant_windows`.

    Args:
        folder: the data folder.
        prompt: the question, with `{text}` where the line's query or question goes; one of `PROMPTS` by default.
        answer: how a window is said, with `{start}` and `{end}`; several follow each other with commas.

    Raises:
        FileNotFoundError: if the file, or a video that it names, isn't there.
        ValueError: if a line isn't such an object; the message says which line, and what is wrong with it.
    """
    return [_sample(entry, folder, line, prompt, answer) for entry, line in read_entries(folder, texts=("split",))]


def say_windows(windows: Sequence[Window], answer: str = ANSWER) -> str:
    """Windows in words."""
    return ", ".join(answer.format(start=start, end=end) for start, end in windows)


def _sample(entry: dict[str, Any], folder: Path, line: str, prompt: str | None, answer: str) -> Sample:
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        raise ValueError(f"{line}: needs one of {', '.join(map(repr, KINDS))}; it has {kinds or 'none'}.")
    kind = kinds[0]
    windows = _windows(entry.get("relevant_windows"), line) if "relevant_windows" in entry else None
    if kind == "messages":
        messages, said = _conversation(entry["messages"], line)
    else:
        if kind == "query" and windows is None:
            raise ValueError(f"{line}: a 'query' needs 'relevant_windows' beside it.")
        texts = [kind, KINDS[kind]] if kind == "question" else [kind]
        for field in texts:
            if not isinstance(entry.get(field), str) or not entry[field].strip():
                raise ValueError(f"{line}: field {field!r} is missing or no text.")
        asked = (prompt or PROMPTS[kind]).replace("{text}", "" if kind == "caption" else entry[kind])
        messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked}]}]
        said = (
            say_windows(windows or (), answer) if kind == "query" else entry["answer" if "answer" in texts else kind]
        )
    return Sample(folder / entry["video"], entry["split"], kind, messages, said, windows, line)


def _windows(given: Any, line: str) -> list[Window]:
    if not isinstance(given, list) or not given or not all(map(is_span, given)):
        raise ValueError(f"{line}: `relevant_windows` must be pairs of seconds [start, end], start < end: {given!r}.")
    return [(float(start), float(end)) for start, end in given]


def _conversation(given: Any, line: str) -> tuple[list[Message], str]:
    """The messages before the last one, and what that says."""
    whole = isinstance(given, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in given)
    if not whole or len(given) < 2 or given[-1]["role"] != "assistant" or given[-2]["role"] != "user":
        raise ValueError(
            f"{line}: `messages` must be objects with 'role' and 'content', at the end the user's and the assistant's."
        )
    *messages, last = given
    items = [item for m in messages if isinstance(m["content"], list) for item in m["content"]]
    if sum(item.get("type") == "video" for item in items) != 1 or any(item.get("type") == "image" for item in items):
        raise ValueError(f'{line}: `messages` must hold one {{"type": "video"}} before the answer, and no images.')
    said = last["content"]
    if isinstance(said, list):
        said = "".join(item.get("text", "") for item in said)
    if not isinstance(said, str) or not said.strip():
        raise ValueError(f"{line}: the last of `messages` has no text.")
    return messages, said
