"""READ with its default targets on a tiny model of every family: each check of the conformance suite."""

from contextlib import nullcontext

import pytest
from benchmarks.conformance_table import PAGE, table, table_in
from conformance.checks import CHECKS, applicable, outcome
from conformance.families import FAMILIES, base_model


FOREIGN_WARNINGS = pytest.mark.filterwarnings(
    # WavLM's own call of torch's attention.
    "ignore:Support for mismatched key_padding_mask and attn_mask is deprecated:UserWarning",
    # How transformers before 5.23 defines functions of DeBERTa and GPTBigCode.
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
)


@FOREIGN_WARNINGS
@pytest.mark.parametrize(("family", "check"), list(applicable()))
def test_conformance(family, check):
    """A check that can't apply to a family, such as padding to images, isn't there; `families.py` says why."""
    error = outcome(family, check)
    if error is not None:
        raise error


@pytest.mark.parametrize("family", [family for family, known in FAMILIES.items() if known.fault])
def test_what_is_mended_is_the_base_s_own_fault(family):
    """Before the release that the family names, and only there, the base model fails a check unless it is mended."""
    fault = FAMILIES[family].fault
    check = CHECKS[fault.check][0]
    check(family, base_model(family, mended=True))
    with pytest.raises(AssertionError, match="off by") if fault.is_here else nullcontext():
        check(family, base_model(family))


def test_the_page_tells_the_outcome():
    """The page's table is what `conformance_table.py` writes if every check passes, as the tests above see to."""
    assert table_in(PAGE.read_text(encoding="utf-8")) == table(lambda family, check: None)
