"""Values of rows that a data frame wrote: whole numbers as floats, NaN for missing fields, numbers as ids.

A column of integers with a missing value becomes a column of floats in pandas, so 20 is written as `20.0` and the gap
as `NaN`. A value is taken as a whole number only where nothing is lost: its fraction is zero, and it is at most
2**53.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final

INTEGERS: Final = frozenset(
    {
        "best_of",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_tokens",
        "n",
        "seed",
        "top_k",
        "top_logprobs",
    }
)
"""Fields of a request, or of its `coe`, that are whole numbers."""
_EXACT: Final = 2**53
"""Above it, not every whole number is a float: another one may have been meant."""
_TIMES: Final = (date, datetime, time, timedelta)


def given(fields: Mapping[str, Any], *, nulls: bool) -> dict[str, Any]:
    """The fields without NaN, at any depth, and with whole numbers where a request has them.

    Args:
        nulls: also drop fields that are null, at any depth.
    """
    kept = {
        key: _given(value, nulls) for key, value in fields.items() if not (is_nan(value) or (nulls and value is None))
    }
    return {key: whole(value) if key in INTEGERS else value for key, value in kept.items()}


def whole(value: Any) -> Any:
    """The integer that a float or decimal is exactly; any other value as it is."""
    if (
        isinstance(value, float | Decimal)
        and math.isfinite(value)
        and value == int(value)
        and abs(int(value)) <= _EXACT
    ):
        return int(value)
    return value


def text_id(value: object) -> str | None:
    """An id as text: `1` for 1 and 1.0. None for a missing one (null or NaN).

    Raises:
        ValueError: it is neither a text that is not empty nor a whole number; the message says what it is.
    """
    if value is None or is_nan(value):
        return None
    number = whole(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return str(number)
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be a string that is not empty, or an integer; got {kind_of(value)}")
    return value


def is_nan(value: object) -> bool:
    """Whether a value is the NaN that stands for a missing one."""
    return isinstance(value, float | Decimal) and math.isnan(value)


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    if isinstance(value, _TIMES):
        return f"a time ({value})"
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(value, float | Decimal):
        return f"the number {value}"
    return names.get(type(value), "a number")


def _given(value: Any, nulls: bool) -> Any:
    if isinstance(value, dict):
        return given(value, nulls=nulls)
    return [_given(inner, nulls) for inner in value] if isinstance(value, list) else value
