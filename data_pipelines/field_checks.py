"""What fields of a configuration may be: one of their type's choices, a number within bounds; said alike everywhere."""

import functools
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

_BOUNDS: dict[str, Callable[[Any], bool]] = {
    "above 0": lambda value: 0 < value < float("inf"),
    "0 or more": lambda value: 0 <= value < float("inf"),
    "at least 1": lambda value: value >= 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "0 or more and less than 1": lambda value: 0 <= value < 1,
}


def require(is_valid: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError, in the words of every section, unless a field is valid."""
    if not is_valid:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_fields(config: object, section: str, bounds: Mapping[str, str]) -> None:
    """ValueError where a field of a dataclass is none of its Literal's choices, or a number out of bounds.

    bounds: what is expected, a range such as `1 to 1,024` or one of the words above -> names of fields with blanks
    between. None is no number.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for name, hint in hints.items():
        choices, value = typing.get_args(hint), getattr(config, name)
        is_valid = typing.get_origin(hint) is not Literal or value in choices
        require(is_valid, f"{section}.{name}", f"one of {', '.join(map(str, choices))}", value)
    for expected, names in bounds.items():
        for name in names.split():
            value, may_be_none = getattr(config, name), type(None) in typing.get_args(hints[name])
            is_valid = value is None or _is_within(value, expected)
            require(is_valid, f"{section}.{name}", f"{expected}, or null" if may_be_none else expected, value)


def _is_within(value: Any, expected: str) -> bool:
    if (is_within := _BOUNDS.get(expected)) is not None:
        return is_within(value)
    low, high = re.split(" (?:to|and) ", expected.removeprefix("between ").replace(",", ""))
    return float(low) <= value <= float(high)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
