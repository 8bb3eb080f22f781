"""Grader of numbers in free text: `$1,234.50`, `12 %`, `-3e8 m/s`."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from coe.compose.reading import numbers_in
from coe.evaluation.graders.base import GoldError, GraderModel


class Number(GraderModel):
    """1 when the number in the answer is the right one.

    Thousands commas, currency signs, a percent sign and units are ignored: `50%` is 50, not 0.5. Numbers are compared
    as decimals, exactly up to the tolerance. Fractions and numerals in words are not recognised.

    take: which number of the answer counts; `only` refuses answers with two different ones.
    tolerance: largest absolute difference. relative_tolerance: largest difference as a share of the right number.
    """

    take: Literal["last", "first", "only"] = "last"
    tolerance: Annotated[Decimal, Field(ge=0, allow_inf_nan=False)] = Decimal(0)
    relative_tolerance: Annotated[Decimal, Field(ge=0, allow_inf_nan=False)] = Decimal(0)

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        gold = _gold(row["answer"])
        found = numbers_in(answer)
        if not found or (self.take == "only" and len(set(found)) > 1):
            return 0.0
        answered = found[0] if self.take == "first" else found[-1]
        return float(abs(answered - gold) <= max(self.tolerance, self.relative_tolerance * abs(gold)))


def _gold(gold: object) -> Decimal:
    found = numbers_in(str(gold)) if isinstance(gold, str | int | float) and not isinstance(gold, bool) else []
    if len(found) != 1:
        raise GoldError(f"`answer` must hold one number, not {gold!r}")
    return found[0]
