"""Grader of numbers in free text: `$1,234.50`, `12 %`, `-3e8 m/s`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from coe.answers.numbers import DecimalMark, last_number, numbers_in
from coe.answers.stated import boxed
from coe.evaluation.graders.base import GoldError, GraderModel


class Number(GraderModel):
    """1 when the number in the answer is the right one.

    Thousands separators, currency signs, a percent sign and units are ignored: `50%` is 50, not 0.5. Digits of all
    scripts are read. A fraction (`1/2`), a power (`2^{10}`) and `3 \\times 10^5` are one number each. Numbers are
    compared as decimals, exactly up to the tolerance. Numerals in words are not recognised.

    take: which number of the answer counts; `only` refuses answers with two different ones. `last` is the number in the
        last `\\boxed{...}`, if there is one.
    marker: the answer follows the first occurrence of this text, such as GSM8K's `#### `; without it, `take` decides.
    decimal: the decimal mark; `auto` decides by the text: `3,5` is 3.5 in German, French, Spanish or Italian.
    tolerance: largest absolute difference. relative_tolerance: largest difference as a share of the right number.
    """

    take: Literal["last", "first", "only"] = "last"
    marker: Annotated[str, Field(min_length=1)] | None = None
    decimal: DecimalMark = "auto"
    tolerance: Annotated[Decimal, Field(ge=0, allow_inf_nan=False)] = Decimal(0)
    relative_tolerance: Annotated[Decimal, Field(ge=0, allow_inf_nan=False)] = Decimal(0)

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        gold = _gold(row["answer"], self.decimal)
        answered = self._final(self.read(answer))
        if answered is None or not answered.is_finite():
            return 0.0
        return float(abs(answered - gold) <= max(self.tolerance, self.relative_tolerance * abs(gold)))

    def _final(self, answer: str) -> Decimal | None:
        """The number that counts; None if there is none."""
        if self.marker is not None and self.marker in answer:
            line = answer.partition(self.marker)[2].lstrip().partition("\n")[0]
            return next(iter(numbers_in(line, self.decimal)), None)
        if self.take == "last":
            content = boxed(answer)
            in_box = None if content is None else last_number(content, self.decimal)
            return in_box if in_box is not None else last_number(answer, self.decimal)
        found = numbers_in(answer, self.decimal)
        return found[0] if found and (self.take == "first" or _same(found)) else None


def _same(numbers: Sequence[Decimal]) -> bool:
    return all(number == numbers[0] for number in numbers)


def _gold(gold: object, decimal: DecimalMark) -> Decimal:
    is_number = isinstance(gold, int | float) and not isinstance(gold, bool)
    found = numbers_in(str(gold), "point" if is_number else decimal) if is_number or isinstance(gold, str) else []
    if len(found) != 1 or not found[0].is_finite():
        raise GoldError(f"`answer` must hold one number, not {gold!r}")
    return found[0]
