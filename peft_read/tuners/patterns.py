"""A bound on the time that regular expressions of a configuration take, before PEFT matches names with them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from peft import PeftConfig

from .checks import shown


SECONDS = 1
# Matches every name in a process of its own: Python's `re` can't be interrupted, and holds all threads of this one.
CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
except (ImportError, ValueError, OSError):
    pass
method, pattern, names = json.load(sys.stdin)
match = getattr(re.compile(pattern), method)
for name in names:
    match(name)
""".replace("SECONDS", str(SECONDS))


class Matching(NamedTuple):
    """How PEFT matches names: the field of the configuration, the method of `re`, and the expression."""

    field: str
    method: str
    pattern: str


def check_matching(config: PeftConfig, names: Iterable[str]) -> None:
    """Refuse regular expressions in a configuration that backtrack without end.

    Args:
        config: the configuration.
        names: names of the modules that will be matched.

    Raises:
        ValueError: if an expression can't be compiled, or matching takes more than a second of a processor; the
            message names the field.
    """
    all_names = list(names)
    for field, method, pattern in _matchings(config):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`{field}` can't stand in {shown(pattern)}, into which PEFT puts it: {error}.") from None
        if not _is_plain(pattern) and _takes_too_long(method, pattern, all_names):
            raise ValueError(
                f"`{field}` is a regular expression that takes more than {SECONDS} s to match the names of this "
                f"model's {len(all_names)} modules. Write it without repetitions inside of repetitions, such as "
                "(a+)+, or give a list of names."
            )


def _matchings(config: PeftConfig) -> Iterator[Matching]:
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str) and value != "all-linear":
            yield Matching(field, "fullmatch", value)
    layers = getattr(config, "layers_pattern", None) or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield Matching("layers_pattern", "match", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
    for pattern in getattr(config, "rank_pattern", None) or {}:
        yield Matching("rank_pattern", "match", rf"(.*\.)?({pattern})$")


def _is_plain(pattern: str) -> bool:
    """Whether an expression has too few repetitions and choices to take long."""
    return len(re.findall(r"[*+?{|]", pattern)) <= 3 and not re.search(r"\)[*+{]", pattern)


def _takes_too_long(method: str, pattern: str, names: list[str]) -> bool:
    if not sys.executable:
        return False
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CHILD],
            input=json.dumps([method, pattern, names]).encode(),
            timeout=10 * SECONDS,  # of a machine that does other things, too
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return True
    except OSError:  # no process can be started here
        return False
    return child.returncode < 0  # killed for its time
