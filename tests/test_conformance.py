"""READ with its default targets on a tiny model of every family: each check of the conformance suite."""

import pytest
from conformance.checks import applicable, outcome


# WavLM's own call of torch's attention.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask is deprecated:UserWarning")
@pytest.mark.parametrize(("family", "check"), list(applicable()))
def test_conformance(family, check):
    """A check that can't apply to a family, such as padding to images, isn't there; `families.py` says why."""
    error = outcome(family, check)
    if error is not None:
        raise error
