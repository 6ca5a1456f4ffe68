"""A model card as its parts, so that what a person wrote into it can be told from what was generated.

Whatever a file holds, it is read in a time that grows with its size alone, or refused with a sentence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData


OPENING = "#"  # the key of what stands before the first section
RECORD, END = "<!-- peft_read, to tell what you change: ", " -->"
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
SYNCED = "*"  # the key of the whole page in the record
LARGEST, LARGEST_METADATA, DEEPEST_METADATA = 2_000_000, 50_000, 50  # characters, and lists within lists
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C, where PyYAML was built with it
UNREADABLE = (ValueError, OSError, RecursionError, yaml.YAMLError)


class UnreadableCardError(ValueError):
    """A card that can't be read, and so neither renewed nor written over."""


@dataclass
class Page:
    """A card's parts: the fields of its metadata by their names, its sections by their headings (`## Use`).

    Attributes:
        parts: the parts, in the order in which they stand.
        record: the fingerprint of each part as it was generated, and under `*` that of the whole page when it was last
            pushed, or written without anybody having changed it.
        header: the metadata as they were read, with comments and all.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    record: dict[str, str] = field(default_factory=dict)
    header: str = ""

    @classmethod
    def parse(cls, content: str) -> Page:
        """Take a card's text apart.

        Raises:
            ValueError: if its metadata can't be read.
        """
        header, text = _split(content.replace("\r\n", "\n"))
        text, record = _without_record(text)
        return cls(_metadata(header) | _sections(text), record, header)

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Page | None:
        """The card in a file, None if there is no such file.

        Args:
            path: of the file.
            name: what to call it in an error; by default its path.

        Raises:
            UnreadableCardError: if it is no file of its own, or can't be read.
        """
        try:
            if name is None and path.is_symlink():
                raise ValueError("it is a link to another file")
            if not path.exists():
                return None
            if not path.is_file():
                raise ValueError("it is no file")
            if path.stat().st_size > LARGEST:
                raise ValueError(f"it has more than {LARGEST:,} bytes")
            return cls.parse(path.read_text(encoding="utf-8-sig"))
        except UNREADABLE as error:
            raise UnreadableCardError(
                f"The card {name or path} can't be read, so it isn't renewed: {str(error)[:300]}\n"
                "Mend it (its metadata stand between two lines `---` at the top), or take it away."
            ) from error

    @property
    def changed(self) -> bool:
        """Whether a person changed the page since it was last pushed, or wrote it."""
        return self.record.get(SYNCED) != self._whole()

    def conflicts(self, other: Page) -> list[str]:
        """Which parts differ between two pages, at least one of them by a person's hand."""
        keys = dict.fromkeys([*self.parts, *other.parts, *self.record, *other.record])
        return [
            key for key in keys if self._mark(key) != other._mark(key) and (self._edited(key) or other._edited(key))
        ]

    def _mark(self, key: str) -> str | None:
        return fingerprint(self.parts[key]) if key in self.parts else None

    def _edited(self, key: str) -> bool:
        """Whether a person changed a part, took it out, or wrote it."""
        return key != SYNCED and self._mark(key) != self.record.get(key)

    def renewed(self, new: Page, unsure: Collection[str] = ()) -> Page:
        """This page with its generated parts as they are in `new`.

        What a person changed stays as it is, a part that they took out stays out, parts of their own stay. Only
        `library_name` is always the generated one: the Hub tells by it how the files are loaded.

        Args:
            new: a page as it is generated now.
            unsure: parts of `new` that only fill a gap: they take no existing part's place.
        """
        parts, record = dict(self.parts), dict(self.record)
        for key in [key for key in parts if key.startswith("## ") and key not in new.parts]:
            if record.pop(key, None) == fingerprint(parts[key]):  # generated once, and no longer
                del parts[key]
        before = OPENING
        for key, value in new.parts.items():
            there = key in parts
            theirs = (there or key in record) and self._edited(key) and key != "library_name"
            if key == "tags" and there and key not in record:
                parts[key] = union(parts[key], value)
            if theirs or (there and key in unsure):
                record.setdefault(key, fingerprint(value))
            else:
                parts = _placed(parts, key, value, before)
                record[key] = fingerprint(value)
            before = key if key.startswith("#") and key in parts else before
        return Page(parts, record, self.header)

    def synced(self) -> Page:
        """This page as one that nobody has changed yet."""
        return Page(self.parts, self.record | {SYNCED: self._whole()}, self.header)

    def _whole(self) -> str:
        return fingerprint({key: fingerprint(value) for key, value in self.parts.items()})

    def __str__(self) -> str:
        """The card's text."""
        fields = {key: value for key, value in self.parts.items() if not key.startswith("#")}
        sections = [value for key, value in self.parts.items() if key.startswith("#")]
        header = self.header
        if not header or _metadata(header) != fields:
            data = CardData()
            data.__dict__.update(fields)  # also one that is called as an argument of `CardData` is
            header = f"---\n{data.to_yaml()}\n---\n"
        return "\n\n".join([header.rstrip(), *sections, f"{RECORD}{json.dumps(self.record)}{END}"]) + "\n"


def listed(value: Any) -> list[Any]:
    """A field that holds one value, several, or none."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def union(first: Any, second: Any) -> list[Any]:
    """What two fields hold, in the order in which it comes."""
    return list(dict.fromkeys([*listed(first), *listed(second)]))


def fingerprint(value: Any) -> str:
    """The same for what differs in nothing but the ends of lines and the order of fields."""
    if isinstance(value, str):
        value = "\n".join(line.rstrip() for line in value.strip().splitlines())
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_fence(text: str) -> str:
    """The fence of a code block that isn't closed at the end of a text, empty if there is none."""
    *_, (_, fence) = _lines(text)
    return fence


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line, and the fence of the code block in which it leaves the text."""
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        yield line, fence


def _split(content: str) -> tuple[str, str]:
    """The metadata, with the lines around them, and the text."""
    stripped = content.lstrip()
    if not stripped.startswith("---\n"):
        return "", content
    end = stripped.find("\n---\n", 3)
    if end < 0 and stripped.endswith("\n---"):
        end = len(stripped) - 4
    return ("", content) if end < 0 else (stripped[: end + 5], stripped[end + 5 :])


def _metadata(header: str) -> dict[str, Any]:
    """The fields of a card's metadata."""
    block = header.strip().removeprefix("---").removesuffix("---")
    if len(block) > LARGEST_METADATA:
        raise ValueError(f"its metadata have more than {LARGEST_METADATA:,} characters")
    depth = 0
    for event in yaml.parse(block, Loader=LOADER):
        # A few lines of aliases of aliases stand for more than a memory holds.
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("its metadata refer to each other (`*name`), which isn't followed")
        # PyYAML's time grows with the square of the depth.
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_METADATA:
            raise ValueError(f"its metadata have lists within lists more than {DEEPEST_METADATA} deep")
    fields = yaml.load(block, Loader=LOADER) or {}
    if not isinstance(fields, dict) or not all(isinstance(key, str) and key for key in fields):
        raise ValueError("its metadata aren't fields with names")
    if any(key.startswith("#") for key in fields):
        raise ValueError("its metadata have a field whose name begins with '#'")
    return {key: value for key, value in fields.items() if value is not None}


def _without_record(text: str) -> tuple[str, dict[str, str]]:
    """A text without the records in it, and what the last of them says."""
    pieces, records, place, after = [], [], 0, 0
    while (end := text.find(END, after)) >= 0:
        start = text.rfind(RECORD, after, end)
        after = end + len(END)
        if start >= 0 and "\n" not in text[start:end]:
            pieces.append(text[place:start].rstrip())
            records.append(text[start + len(RECORD) : end])
            place = after
    pieces.append(text[place:])
    try:
        record = json.loads(records[-1]) if records else {}
    except (ValueError, RecursionError):  # somebody's edit: then all that is there is theirs
        record = {}
    valid = isinstance(record, dict) and all(isinstance(value, str) for value in record.values())
    return "\n\n".join(pieces), record if valid else {}


def _sections(text: str) -> dict[str, str]:
    """What stands before the first heading of the second level, and from each such heading to the next."""
    lines: dict[str, list[str]] = {OPENING: []}
    key, before, seen = OPENING, "", dict[str, int]()
    for line, fence in _lines(text):
        if line.startswith("## ") and not before:
            key = line.rstrip()
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1:  # another one of that name
                key = f"{key} ({seen[key]})"
            lines.setdefault(key, [])
        lines[key].append(line)
        before = fence
    texts = {key: "\n".join(part).strip("\n") for key, part in lines.items()}
    return {key: part for key, part in texts.items() if part.strip()}


def _placed(parts: dict[str, Any], key: str, value: Any, before: str) -> dict[str, Any]:
    """With a part put where it stands, else a section behind another one or, as the opening, first; else last."""
    if key in parts or not key.startswith("#") or (key != OPENING and before not in parts):
        return parts | {key: value}
    items = list(parts.items())
    place = 0 if key == OPENING else list(parts).index(before) + 1
    return dict([*items[:place], (key, value), *items[place:]])
