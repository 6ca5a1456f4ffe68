"""The package's description on PyPI: README.md, with pictures and links that lead into the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


# A Markdown link or picture, `](path)` or `](path#section)`, but no address and no section of the same page.
RELATIVE = re.compile(r"(?P<picture>!?)(?P<text>\[[^]]*\])\((?!\w+:|#)(?P<path>[^)]+)\)")


def absolute(text: str, repository: str) -> str:
    """Markdown whose relative pictures and links are addresses in a repository, on GitHub or laid out like it.

    Args:
        text: the Markdown.
        repository: address of the repository, such as `https://github.com/someone/something`.
    """

    def address(match: re.Match[str]) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}{match['text']}({repository.rstrip('/')}/{kind}/HEAD/{match['path']})"

    return RELATIVE.sub(address, text)


class ReadmeHook(MetadataHookInterface):
    """Gives the package its description; without a `Repository` in `[project.urls]` it is README.md as it stands."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the `readme` to the `[project]` table."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, repository) if repository else text,
        }
