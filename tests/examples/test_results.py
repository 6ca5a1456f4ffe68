"""What the pages say was measured is what the results say."""

import json
import sys
from pathlib import Path

import low_resource_comparison
import pytest
from alignment_study.results import Results, by_seed
from alignment_study.rows import ALONE, CONTRASTIVE, DIGIT_WORDS


EXAMPLES = Path(low_resource_comparison.__file__).parent
RESULTS = EXAMPLES / "results"


@pytest.fixture
def readme_lines(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "benchmarks"), *sys.path])
    return pytest.importorskip("readme_lines")


def test_pages_say_what_the_results_say(readme_lines):
    """The front page's lines and the tables are made of the results; after a new run the script writes them anew."""
    for path, text in readme_lines.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python examples/benchmarks/readme_lines.py"


@pytest.mark.parametrize(("row", "sentence"), [(DIGIT_WORDS, "{} mAP became {}."), (CONTRASTIVE, "{} became {}.")])
def test_the_front_page_says_what_pvla_gave(row, sentence):
    """The means of READ alone and with PVLA, over the same seeds."""
    results = Results(EXAMPLES / "benchmarks" / "pvla_pairs.json")
    entries = [by_seed(results, "second", 100, name) for name in (ALONE, row)]
    both = entries[0].keys() & entries[1].keys()
    means = [sum(some[seed]["test mAP"] for seed in both) / len(both) for some in entries]
    page = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert sentence.format(*(f"{mean:.1f}" for mean in means)) in page


@pytest.mark.parametrize("name", ["low_resource", "remade_bases"])
def test_results_say_where_they_are_from(name):
    """Command, processor, cores and versions; each run once."""
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (EXAMPLES.parent / results["command"].split()[1]).is_file()
    assert results["machine"].keys() >= {"cpu", "cores", "versions"}
    assert results["machine"]["versions"].keys() >= {"torch", "transformers", "peft", "python"}
    keys = ("panel", "method", "videos", "steps", "seed", "rate", "threads")
    runs = [tuple(run.get(key) for key in keys) for run in results["runs"]]
    assert len(runs) == len(set(runs)) > 0


def test_a_page_without_marks_is_named(readme_lines):
    with pytest.raises(ValueError, match="The page needs the marks"):
        readme_lines._fill("no marks", {"measured": "text"})
