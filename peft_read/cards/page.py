"""A model card as its parts, so that what a person wrote into it can be told from what was generated."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CardData
from huggingface_hub.repocard import RepoCard
from yaml import YAMLError


OPENING = "#"  # the key of what stands before the first section
RECORD = re.compile(r"\s*<!-- peft_read, to tell what you change: (\{.*?\}) -->\s*", re.DOTALL)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
SYNCED = "*"  # the key of the whole page in the record


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
        card = RepoCard(content)  # a ModelCard would lose what it doesn't know of in a `model-index`
        parts = card.data.to_dict() | _sections(RECORD.sub("\n\n", card.text))
        return cls(parts, _record(card.text), content.removesuffix(card.text))

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Page | None:
        """The card in a file, None if there is no such file.

        Args:
            path: of the file.
            name: what to call it in an error; by default its path.

        Raises:
            ValueError: if its metadata can't be read.
        """
        if not path.is_file():
            return None
        try:
            return cls.parse(path.read_text(encoding="utf-8-sig"))
        except (ValueError, YAMLError) as error:
            raise ValueError(
                f"The metadata at the top of {name or path} can't be read, so the card can't be renewed: {error}\n"
                "Mend the lines between the two `---`, or take the card away."
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
        return _fingerprint(self.parts[key]) if key in self.parts else None

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
            if record.pop(key, None) == _fingerprint(parts[key]):  # generated once, and no longer
                del parts[key]
        before = OPENING
        for key, value in new.parts.items():
            there = key in parts
            theirs = (there or key in record) and self._edited(key) and key != "library_name"
            if key == "tags" and there and key not in record:
                parts[key] = union(parts[key], value)
            if theirs or (there and key in unsure):
                record.setdefault(key, _fingerprint(value))
            else:
                parts = _placed(parts, key, value, before)
                record[key] = _fingerprint(value)
            before = key if key.startswith("#") and key in parts else before
        return Page(parts, record, self.header)

    def synced(self) -> Page:
        """This page as one that nobody has changed yet."""
        return Page(self.parts, self.record | {SYNCED: self._whole()}, self.header)

    def _whole(self) -> str:
        return _fingerprint({key: _fingerprint(value) for key, value in self.parts.items()})

    def __str__(self) -> str:
        """The card's text."""
        fields = {key: value for key, value in self.parts.items() if not key.startswith("#")}
        sections = [value for key, value in self.parts.items() if key.startswith("#")]
        header = self.header
        if not header or RepoCard(header).data.to_dict() != fields:
            header = f"---\n{CardData(**fields).to_yaml()}\n---\n"
        record = f"<!-- peft_read, to tell what you change: {json.dumps(self.record)} -->"
        return header.rstrip() + "\n\n" + "\n\n".join([*sections, record]) + "\n"


def listed(value: Any) -> list[Any]:
    """A field that holds one value, several, or none."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def union(first: Any, second: Any) -> list[Any]:
    """What two fields hold, in the order in which it comes."""
    return list(dict.fromkeys([*listed(first), *listed(second)]))


def _record(text: str) -> dict[str, str]:
    found = RECORD.search(text)
    try:
        return dict(json.loads(found[1])) if found else {}
    except ValueError:  # somebody's edit: then all that is there is theirs
        return {}


def _sections(text: str) -> dict[str, str]:
    """What stands before the first heading of the second level, and from each such heading to the next."""
    lines: dict[str, list[str]] = {OPENING: []}
    key, fence = OPENING, ""
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        elif line.startswith("## ") and not fence:
            key = line.rstrip()
            while key in lines:  # the second of one name
                key += " "
            lines[key] = []
        lines[key].append(line)
    texts = {key: "\n".join(part).strip("\n") for key, part in lines.items()}
    return {key: part for key, part in texts.items() if part.strip()}


def _placed(parts: dict[str, Any], key: str, value: Any, before: str) -> dict[str, Any]:
    """With a part put where it stands, else a section behind another one or, as the opening, first; else last."""
    if key in parts or not key.startswith("#") or (key != OPENING and before not in parts):
        return parts | {key: value}
    items = list(parts.items())
    place = 0 if key == OPENING else list(parts).index(before) + 1
    return dict([*items[:place], (key, value), *items[place:]])


def _fingerprint(value: Any) -> str:
    """The same for what differs in nothing but the ends of lines and the order of fields."""
    if isinstance(value, str):
        value = "\n".join(line.rstrip() for line in value.strip().splitlines())
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
