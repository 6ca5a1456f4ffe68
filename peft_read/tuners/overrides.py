"""Methods of PEFT and transformers that do something of their own for READ's and LSTTA's adapters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


ORIGINAL = "_peft_read_original"  # where a method keeps the one that it overrides


def override(
    owner: type, name: str, ours: Callable[..., Any], applies: Callable[[dict[str, Any]], bool], purpose: str
) -> None:
    """Put a function in the place of a method, for some calls; all others take the way that they always took.

    Harmless when called again.

    Args:
        owner: the class.
        name: the method's name.
        ours: called with the original call, as a function without arguments, and the call's arguments by name, those
            beyond the signature under `"kwargs"`. What it changes in the arguments, the original call gets.
        applies: whether a call with these arguments is one of READ's or LSTTA's.
        purpose: what the method is needed for, for the message.

    Raises:
        ImportError: if the class no longer has such a method.
    """
    found = inspect.getattr_static(owner, name, None)
    if found is None:
        raise ImportError(
            f"peft_read {purpose} through {owner.__name__}.{name}, which this version of PEFT or transformers doesn't "
            "have. Upgrade peft_read, or install the versions that it was released for."
        )
    is_classmethod = isinstance(found, classmethod)
    function = found.__func__ if is_classmethod else found
    original = getattr(function, ORIGINAL, function)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if not applies(given.arguments):
            return original(*args, **kwargs)
        return ours(lambda: original(*given.args, **given.kwargs), given.arguments)

    setattr(method, ORIGINAL, original)
    setattr(owner, name, classmethod(method) if is_classmethod else method)
