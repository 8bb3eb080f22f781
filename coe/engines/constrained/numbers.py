"""Large numbers of JSON schemas. llguidance reads numbers as doubles, and whole ones within 64 bits.

So the enumerated number 9007199254740993 would be generated as 9007199254740992.
"""

from __future__ import annotations

from copy import deepcopy
from decimal import Decimal
from typing import Any, Final

from coe.engines.constrained.schemas import places, subschemas

_LEAST: Final = -(2**63)
_MOST: Final = 2**63 - 1
_LEAST_RANGE: Final = _LEAST + 1024
"""The least lower bound that llguidance compiles: the double after the least number of 64 bits."""
_LOWER: Final = ("minimum", "exclusiveMinimum")
_UPPER: Final = ("maximum", "exclusiveMaximum")


def inexact(schema: Any) -> tuple[str, int] | None:
    """The first number of a schema that answers would not keep to: its JSON pointer and value."""
    for place, name, value in places(schema):
        if name in ("enum", "const"):
            found = next((number for number in _whole(value) if not _is_kept(number)), None)
        else:
            found = value if _is_int(value) and _exceeds(name, value) else None
        if found is not None:
            return place, found
    return None


def within_range(schema: Any) -> Any:
    """A schema whose lower bounds can be compiled: those of 64 bits are common, and a higher one keeps to them."""
    if not any(name in _LOWER and _is_too_low(value) for _, name, value in places(schema)):
        return schema
    copy = deepcopy(schema)
    for _, inner in subschemas(copy):
        for name in _LOWER:
            if _is_too_low(inner.get(name)):
                inner[name] = _LEAST_RANGE
    return copy


def _whole(value: Any) -> list[int]:
    """The whole numbers in a value; no recursion, whatever its depth."""
    found, waiting = [], [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list):
            waiting += inner.values() if isinstance(inner, dict) else inner
        elif _is_int(inner):
            found.append(inner)
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_kept(number: int) -> bool:
    """Whether an enumerated number is generated as it is: digits beyond 64 bits are the shortest of a double."""
    double = _double(number)
    return int(double) == number and (_LEAST <= number <= _MOST or Decimal(repr(double)) == number)


def _exceeds(keyword: str, bound: int) -> bool:
    """Whether a bound, as it is read, lets numbers beyond it pass."""
    read = max(_LEAST, min(_MOST, int(_double(bound))))
    return (keyword in _LOWER and read < bound) or (keyword in _UPPER and read > bound)


def _double(number: int) -> float:
    return float(max(-(2**1000), min(2**1000, number)))


def _is_too_low(bound: Any) -> bool:
    is_number = _is_int(bound) or isinstance(bound, float)
    return is_number and _LEAST <= bound < _LEAST_RANGE
