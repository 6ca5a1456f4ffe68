"""Membership in PEFT's registry for methods from outside PEFT."""

from __future__ import annotations

from enum import Enum

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def add_peft_type(name: str) -> None:
    """Make `name` a member of `PeftType`; harmless where this package has done so before.

    PEFT has no entry point for methods from outside, and look-ups by name (`PeftType("READ")`, a saved config) need a
    real member.

    Args:
        name: the method's name, upper case.

    Raises:
        ImportError: if PEFT itself has a method of that name.
    """
    if name not in PeftType.__members__:
        _extend_enum(PeftType, name)
        return
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name])
    if owner is not None and not owner.__module__.startswith(f"{__package__.partition('.')[0]}."):
        raise ImportError(
            f"peft_read can't register {name}: PEFT {peft.__version__} already has a method of that name "
            f"({owner.__module__}.{owner.__name__}). Upgrade peft_read, or install the PEFT version that it was "
            "released for."
        )


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a method under its tuner's prefix, `read_` for the type `READ`; harmless when called again.

    Args:
        config_cls: the method's configuration.
        model_cls: its tuner, whose `prefix` is the type's name in lower case and an underscore: transformers builds
            the prefix from the name.

    Raises:
        ImportError: if PEFT itself has a method of that name.
    """
    name = model_cls.prefix.removesuffix("_")
    add_peft_type(name.upper())
    peft_type = PeftType[name.upper()]
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        # This package again, reloaded: its new classes take the place of the old ones.
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(peft_type, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def _extend_enum(enum_cls: type[Enum], name: str) -> None:
    """Add the member `name = name` to a string enum, as its class statement would have done."""
    member = str.__new__(enum_cls, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_cls  # type: ignore[attr-defined]
    member._sort_order_ = len(enum_cls.__members__)  # type: ignore[attr-defined]
    type.__setattr__(enum_cls, name, member)  # Enum's own __setattr__ is for the time after a member exists
    enum_cls._member_names_.append(name)
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[name] = member
