"""JSON text to values, like `json.loads`; a whole number with too many digits is an error that names its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

_MOST_PLACE: Final = 80
"""Characters of a place in an error."""
Loc = tuple[str | int, ...]


class LongNumber(ValueError):
    """A whole number with more digits than Python converts: the conversion takes quadratic time."""

    def __init__(self, loc: Loc, n_digits: int) -> None:
        place = f"{_dotted(loc)}: " if loc else ""
        super().__init__(
            f"{place}a whole number of {n_digits:,} digits; at most {sys.get_int_max_str_digits():,} are read: "
            "shorten it, or put it in quotes as text"
        )


class _Digits(int):
    """In place of a number that is too long: the number of its digits."""


def loads(
    text: str | bytes,
    *,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """The value of a JSON text; the options are those of `json.loads`.

    Raises:
        LongNumber: a whole number has more than `sys.get_int_max_str_digits()` digits (4,300 by default).
        ValueError: it is not JSON, or a hook refuses it.
        RecursionError: it is nested too deeply.
    """
    hooks: dict[str, Any] = {
        "object_pairs_hook": object_pairs_hook,
        "parse_float": parse_float,
        "parse_constant": parse_constant,
    }
    try:
        return json.loads(text, **hooks)
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError:
        # A hook of our own for whole numbers costs time, so only a text that failed is read with one.
        found = next(_long_numbers(json.loads(text, **hooks, parse_int=_whole)), None)
        if found is None:
            raise
        raise LongNumber(*found) from None


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        return _Digits(len(digits.removeprefix("-")))


def _long_numbers(value: Any) -> Iterator[tuple[Loc, int]]:
    """Place and number of digits of each number that is too long."""
    waiting: list[tuple[Loc, Any]] = [((), value)]
    while waiting:
        loc, value = waiting.pop()
        if isinstance(value, _Digits):
            yield loc, int(value)
        elif isinstance(value, dict):
            waiting += [((*loc, str(key)), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [((*loc, index), inner) for index, inner in enumerate(value)]


def _dotted(loc: Loc) -> str:
    """`("experts", 3, "base")` as `experts[3].base`, in one line of `_MOST_PLACE` characters."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key[: _MOST_PLACE + 1]}" for key in loc).removeprefix(
        "."
    )
    shown = "".join(each if each.isprintable() else "?" for each in text[:_MOST_PLACE])
    return shown if len(text) <= _MOST_PLACE else f"{shown[:-3]}..."
