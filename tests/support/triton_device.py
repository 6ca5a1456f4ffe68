"""Where Triton's kernels run in tests: on a GPU if there is one, else in Triton's interpreter."""
# Named unlike the package `kernels`, which transformers looks for.

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version


triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_old = Version(triton.__version__) < Version("3.7")
MARKS = [
    pytest.mark.skipif(
        DEVICE == "cpu" and _old and Version(np.__version__) >= Version("2.4"),
        reason="Triton 3.6's interpreter makes numbers of arrays of one element, which NumPy 2.4 refuses",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


if DEVICE == "cpu":
    # What interprets the language is put into its modules once and stays there: each launch takes a while for it.
    _language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    _patch = functools.cache(functools.partial(interpreter._patch_lang, _language))
    interpreter._patch_lang = lambda kernel: _patch() and interpreter._LangPatchScope()
