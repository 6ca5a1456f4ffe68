"""Every script of the examples as its page says it is run."""

import re
from pathlib import Path

import pytest
from fresh import run_code


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(
    path.relative_to(EXAMPLES).as_posix()
    for path in EXAMPLES.rglob("*.py")
    if re.search(r"^if __name__ == .__main__.", path.read_text("utf-8"), re.MULTILINE)
)
HELP = """
import contextlib, io, runpy, sys
from pathlib import Path

examples, *scripts = sys.argv[1:]
before = [place for place in sys.path if not Path(place).is_relative_to(examples)]
for script in scripts:
    ours = [n for n, m in sys.modules.items() if str(getattr(m, "__file__", None)).startswith(examples)]
    for name in ours:
        del sys.modules[name]
    path = Path(examples, script)
    sys.argv, sys.path[:] = [str(path), "--help"], [str(path.parent), *before]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
    except BaseException as error:
        raise RuntimeError(f"{script} can't be started: {error!r}") from error
    assert "usage:" in said.getvalue(), script
"""


def test_they_are_found():
    assert {"finetune_video.py", "benchmarks/scan_time.py", "benchmarks/trimodal_filtering.py"} <= set(SCRIPTS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_starts_from_its_own_folder():
    """Where Python looks for modules beside the script alone, as it does on a command line."""
    run_code(HELP, EXAMPLES, *SCRIPTS)
