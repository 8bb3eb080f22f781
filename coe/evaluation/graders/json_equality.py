"""Grader of JSON: equal values; the order of keys and white space do not matter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, NoReturn

from pydantic import Field

from coe.evaluation.graders.base import GoldError, GraderModel, without_fence

_FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_OPENING = re.compile(r"[{\[]")

_WORK_A_TEXT, _WORK_A_CHARACTER = 1_000_000, 8
"""Characters that may be decoded in vain: of any text, and for each of its characters."""
_WORK_OF_A_FAILURE, _WORK_OF_A_DEEP_VALUE = 64, 5_000
_PIECE = 4_096


class JsonEquality(GraderModel):
    """1 when the answer is JSON equal to the row's `answer` (a JSON value, or a string of JSON text).

    The order of keys does not matter, the order of lists does; 1 equals 1.0, but not `"1"` or `true`. Duplicate keys,
    NaN and Infinity are not JSON. A Markdown code block around the answer is ignored.

    allow_text: the value may be inside other text; the last code block counts, else the last object or list.
    numeric_strings: `"12.5"` equals 12.5. tolerance: largest difference between equal numbers.
    """

    allow_text: bool = False
    numeric_strings: bool = False
    tolerance: Annotated[Decimal, Field(ge=0, allow_inf_nan=False)] = Decimal(0)

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        gold = _gold(row["answer"])
        try:
            answered = self._value_in(self.read(answer))
            return float(self._equal(answered, gold))
        except (ValueError, RecursionError):  # not JSON, or nested too deeply
            return 0.0

    def _value_in(self, answer: str) -> object:
        try:
            return _DECODER.decode(without_fence(answer))
        except ValueError:
            if not self.allow_text:
                raise
        blocks = _FENCE.findall(answer)
        return _DECODER.decode(blocks[-1].strip()) if blocks else _last_value(answer)

    def _equal(self, answered: object, gold: object) -> bool:
        if isinstance(answered, dict) and isinstance(gold, dict):
            return answered.keys() == gold.keys() and all(self._equal(answered[key], gold[key]) for key in gold)
        if isinstance(answered, list) and isinstance(gold, list):
            return len(answered) == len(gold) and all(map(self._equal, answered, gold))
        numbers = self._number(answered), self._number(gold)
        if numbers[0] is not None and numbers[1] is not None:
            return abs(numbers[0] - numbers[1]) <= self.tolerance
        return type(answered) is type(gold) and answered == gold

    def _number(self, value: object) -> Decimal | None:
        """The value as a number, if it is one. Numbers are Decimal, so 0.1 equals 0.10."""
        if isinstance(value, Decimal):
            return value
        if self.numeric_strings and isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value):
            return Decimal(value)
        return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("duplicate key")
    return record


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _decimal(digits: str) -> Decimal:
    if len(digits) > 400 or re.search(r"[eE][-+]?\d{4}", digits):
        raise ValueError("number too long or too large")  # its arithmetic could overflow
    return Decimal(digits)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse, parse_float=_decimal, parse_int=_decimal
)


def _last_value(text: str) -> object:
    """The last object or list in a text, outermost.

    Each opening bracket may begin a value that fails far behind it, so the work is bounded: a text that exceeds the
    bound holds no JSON that is read.
    """
    found: list[object] = []
    position, left = 0, _WORK_A_TEXT + _WORK_A_CHARACTER * len(text)
    while match := _OPENING.search(text, position):
        if match.start() > _PIECE:  # an error takes time in proportion to its distance from the start of the text
            text = text[match.start() :]
            position = 0
            continue
        try:
            value, position = _DECODER.raw_decode(text, match.start())
            found.append(value)
        except json.JSONDecodeError as error:
            position, left = match.end(), left - (error.pos - match.start()) - _WORK_OF_A_FAILURE
        except (ValueError, RecursionError):  # of a number, or of the depth; where, is unknown
            position, left = match.end(), left - _WORK_OF_A_DEEP_VALUE
        if left < 0:
            raise ValueError("the text has too many brackets that begin no JSON")
    if not found:
        raise ValueError("no JSON object or list in the text")
    return found[-1]


def _gold(gold: object) -> object:
    try:
        return _DECODER.decode(gold if isinstance(gold, str) else json.dumps(gold))
    except (ValueError, RecursionError) as error:
        raise GoldError(f"`answer` is not JSON: {error}") from error
