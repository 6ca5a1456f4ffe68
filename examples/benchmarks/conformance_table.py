"""Which families READ works on: runs the conformance suite and writes its outcome as a table into their page.

    python examples/benchmarks/conformance_table.py [--print]

Each family is a tiny random model with READ where it puts itself by default. The checks are those of
`tests/support/conformance/checks.py`; a test keeps the table of `tests/conformance/README.md` true. Takes about half a
minute on one core.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "tests" / "conformance" / "README.md"
START, END = "<!-- conformance -->", "<!-- /conformance -->"
PASSED, NOT_APPLICABLE = "✓", "-"
PADDING = {("right",): "✓ right", (): NOT_APPLICABLE}


def table(outcome: Callable[[str, str], Exception | None]) -> str:
    """The outcome of every check on every family, as markdown; footnotes say what is left out, and what is mended.

    Args:
        outcome: what stops a check on a family, by their names; None if it passes.
    """
    from conformance.checks import CHECKS, applicable
    from conformance.families import FAMILIES

    applies = set(applicable())
    rows = [["family", *CHECKS], ["---"] * (len(CHECKS) + 1)]
    reasons: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        if family.reason:
            reasons.setdefault(family.reason, []).append(name)
        if family.fault:
            fault = f"before transformers {family.fault.fixed_in} the base model is at fault: {family.fault.what}"
            reasons.setdefault(f"{fault}; the suite mends that", []).append(name)
        row = [name]
        for check in CHECKS:
            passed = PADDING.get(family.paddings, PASSED) if check == "padding" else PASSED
            error = outcome(name, check) if (name, check) in applies else None
            row.append(_failure(error) if error else passed if (name, check) in applies else NOT_APPLICABLE)
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def table_in(page: str) -> str | None:
    """The table that a page holds between the markers; None without markers."""
    if START not in page or END not in page:
        return None
    return page.partition(START)[2].partition(END)[0].strip() + "\n"


def _failure(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0].replace("|", "\\|")
    return f"{type(error).__name__}: {first[:80]}".rstrip(": ")


def main() -> None:
    """Run all checks, and write or print the table."""
    parser = argparse.ArgumentParser(description="The conformance suite's outcome as a table.")
    parser.add_argument("--print", action="store_true", help="print the table and leave the page alone")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "examples")]
    warnings.simplefilter("ignore")  # of the base models
    from conformance.checks import outcome

    result = table(outcome)
    if args.print:
        print(result, end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    if table_in(page) is None:
        sys.exit(f"{PAGE} has no place for the table: put {START} and {END} on lines of their own, or use --print.")
    before, _, rest = page.partition(START)
    PAGE.write_text(f"{before}{START}\n{result}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
