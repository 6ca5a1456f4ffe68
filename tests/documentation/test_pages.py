"""The documentation's Python runs as it stands, its links lead somewhere, and the front page stays one."""

import re

import huggingface_hub
import pytest
from pages import FILES, ROOT, TEMPLATES, blocks, fill_cache, fill_folder, pages, run

import peft_read


LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the Hub, in which every model that the pages name is a tiny one of its kind."""
    folder = tmp_path_factory.mktemp("hub")
    fill_cache(folder)
    return folder


@pytest.mark.filterwarnings(
    "ignore:.*(torchvision|torchaudio|mel filter).*",  # without which transformers takes another way
    "ignore:'pin_memory' argument is set as true:UserWarning",  # the Trainer's default, which wants a GPU
    "ignore::FutureWarning",  # of torch's own exporter
    "ignore::DeprecationWarning",  # likewise
    "ignore:You are trying to modify a model with PEFT for a second time:UserWarning",  # as the page says
    "ignore:# The axis name. (batch|time) will not be used:UserWarning",  # likewise
)
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)])
def test_python_blocks(page, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    fill_folder(tmp_path)
    FILES.get(page, lambda folder: None)(tmp_path)
    run(page)


def test_blocks_are_found():
    """The front page has some under each of these headings, and other pages have some."""
    assert {"peft-read", "READ", "PVLA", "LSTTA", "Share"} <= {block.heading for block in blocks("README.md")}
    assert sum(bool(blocks(page)) for page in pages()) > 3


@pytest.mark.parametrize("page", [page for page in pages() if page not in TEMPLATES])
def test_links(page):
    """A relative link leads to a file or a folder, and to a heading of it if it names one."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        path, _, section = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if section:
            assert section in headings(target), link


@pytest.mark.parametrize("page", [page for page in pages() if page not in TEMPLATES])
def test_commands_name_scripts_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for script in re.findall(r"(?:^|\s)((?:examples|\.ci)/[\w/.]+)", "\n".join(FENCE.findall(text))):
        assert (ROOT / script).exists(), script


def headings(path):
    """The names under which a page's headings can be linked to."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_is_one():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_front_page_names_every_public_name():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Public names\n")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)[(`]", section)
    assert set(peft_read.__all__) <= set(named)
