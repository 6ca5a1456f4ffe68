"""The package's page: README.md, whose pictures and links lead into the repository once its address is known."""

import importlib.util
import re

import pytest
from pages import ROOT


ADDRESS = "https://example.org/someone/peft-read"


@pytest.fixture(scope="module")
def build():
    """The build's own module, which isn't part of the package."""
    pytest.importorskip("hatchling", reason="the build backend isn't installed")
    spec = importlib.util.spec_from_file_location("description", ROOT / ".ci" / "description.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(build, urls):
    metadata = {"urls": urls}
    build.ReadmeHook(str(ROOT), {}).update(metadata)
    return metadata["readme"]["text"]


def test_pictures_and_links_lead_into_the_repository(build):
    """PyPI shows no file that lies beside the README."""
    text = page_of(build, {"Repository": f"{ADDRESS}/"})
    assert f"]({ADDRESS}/raw/HEAD/examples/saliency.png)" in text
    assert f"]({ADDRESS}/blob/HEAD/examples/inputs.md)" in text
    assert "](https://arxiv.org/abs/2312.06950)" in text
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("https://", "#"))] == []


def test_without_an_address_the_page_is_the_readme(build):
    assert page_of(build, {}) == (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_section_and_an_address_stay(build):
    text = "[a](#b) ![c](d.png) [e](https://f.org/g) [`h`](i/j.py#k)"
    expected = f"[a](#b) ![c]({ADDRESS}/raw/HEAD/d.png) [e](https://f.org/g) [`h`]({ADDRESS}/blob/HEAD/i/j.py#k)"
    assert build.absolute(text, ADDRESS) == expected
