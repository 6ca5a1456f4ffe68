"""Examples in docstrings run, every public function has some, and every room's docstring names each of its files."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import peft_read


PACKAGE = Path(peft_read.__file__).parent
FUNCTIONS = [name for name in peft_read.__all__ if inspect.isfunction(getattr(peft_read, name))]
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_examples(path):
    """A module is only imported if it has examples: Triton's need a package that not every system has."""
    if "onnx_translations()" in path.read_text(encoding="utf-8"):
        pytest.importorskip("onnxscript")
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted
    assert not failed


@pytest.mark.parametrize("name", [*FUNCTIONS, "PvlaLoss"])
def test_every_public_function_has_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(peft_read, name).__doc__)


@pytest.mark.parametrize(
    "room", sorted(path.parent for path in PACKAGE.glob("*/__init__.py")), ids=lambda room: room.name
)
def test_a_room_s_docstring_names_its_files(room):
    """Each of them, and none that isn't there."""
    text = importlib.import_module(f"peft_read.{room.name}").__doc__
    files = {path.name for path in room.glob("*.py")} - {"__init__.py"}
    assert {name for name in files if f"`{name}`" not in text} == set()
    named = {word.strip("`").removesuffix("'s") for word in text.split("`") if word.endswith(".py")}
    assert {name for name in named if not (room / name).exists() and not (PACKAGE / name).exists()} == set()


def test_the_package_s_docstring_names_its_rooms():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}`" not in peft_read.__doc__} == set()
