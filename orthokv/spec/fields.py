"""Fields of a `config.json`, which anybody may have written: checked, and refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthokv.spec.errors import InvalidModel

# Larger than any model has, small enough to calculate with.
MOST = 1 << 40
_SHOWN = 60


def invalid(name: str, wanted: str, value: object) -> InvalidModel:
    """The refusal of a field. A value is shown only as far as it is short."""
    shown = repr(value) if isinstance(value, str | float | bool | None) else f"a {type(value).__name__}"
    if type(value) is int:
        shown = str(value) if abs(value) < 1 << 64 else "a number of more than 64 bits"
    return InvalidModel(f"config.json: {name} must be {wanted}, not {shown[:_SHOWN]}")


def whole(name: str, value: object, most: int = MOST, *, least: int = 1) -> int:
    """The value, if it is a whole number within the bounds."""
    if type(value) is not int or not least <= value <= most:
        raise invalid(name, f"a whole number from {least} to {most}", value)
    return value


def optional(config: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """A whole number of a configuration, or None where it says `null`."""
    value = config.get(name, default)
    return None if value is None else whole(name, value)
