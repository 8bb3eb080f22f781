"""Grader of SQL: the answer is right when it returns the same rows as the right query."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from coe.evaluation.graders.base import GoldError, GraderModel, without_fence
from coe.evaluation.graders.sandbox import QueryError, Rows, database, select
from coe.evaluation.graders.sql_text import has_outer_order

MAX_COMPARISONS = 1_000_000
"""Pairs of rows that are compared; equal results need little more than one a row."""
_BLOCK = re.compile(r"```\w*[ \t]*\n(.*?)```", re.DOTALL)


class SqlResult(GraderModel):
    """1 when the answer's result equals that of the row's `answer`, on the database that its `schema_sql` builds.

    The order of rows matters only if the right query has an outermost ORDER BY (which should be total: SQLite returns
    ties in any order). The order of columns matters, their names do not. 1 equals 1.0. The last code block counts, or
    the whole text. Comments and a final semicolon are ignored; anything but one SELECT within the bounds of
    `coe.evaluation.graders.sandbox` scores 0.

    tolerance: largest difference between equal floats, relative above 1 and absolute below.
    """

    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        schema, gold = row.get("schema_sql"), row["answer"]
        if not isinstance(schema, str) or not isinstance(gold, str):
            raise GoldError("`schema_sql` and `answer` must be strings of SQL")
        right = _gold_rows(schema, gold)
        try:
            # A separate database: one query cannot affect the other.
            with database(schema) as connection:
                answered = select(connection, _statement(self.read(answer)), max_rows=len(right))
        except QueryError:
            return 0.0
        return float(self._same(answered, right, ordered=has_outer_order(gold)))

    def _same(self, answered: Rows, right: Rows, *, ordered: bool) -> bool:
        if len(answered) != len(right):
            return False
        if ordered:
            return all(map(self._same_row, answered, right))
        # Rows that differ by rounding may sort apart: each right row takes the first one that matches.
        left, compared = sorted(answered, key=_sort_key), 0
        for row in sorted(right, key=_sort_key):
            found = next((index for index, other in enumerate(left) if self._same_row(other, row)), None)
            compared += len(left) if found is None else found + 1
            if found is None or compared > MAX_COMPARISONS:
                return False
            del left[found]
        return True

    def _same_row(self, answered: tuple[object, ...], right: tuple[object, ...]) -> bool:
        return len(answered) == len(right) and all(map(self._same_value, answered, right))

    def _same_value(self, answered: object, right: object) -> bool:
        if isinstance(answered, float) or isinstance(right, float):
            return (
                isinstance(answered, int | float)
                and isinstance(right, int | float)
                and math.isclose(answered, right, rel_tol=self.tolerance, abs_tol=self.tolerance)
            )
        return type(answered) is type(right) and answered == right


def _statement(answer: str) -> str:
    """The query of an answer: the last code block, else the whole text."""
    blocks = _BLOCK.findall(answer)
    return (blocks[-1] if blocks else without_fence(answer)).strip("\ufeff\u200b \t\r\n").removesuffix(";")


def _gold_rows(schema: str, gold: str) -> Rows:
    try:
        with database(schema) as connection:
            return select(connection, _statement(gold))
    except QueryError as error:
        raise GoldError(f"the right query cannot be run: {error}") from error


def _sort_key(row: tuple[object, ...]) -> tuple[tuple[tuple[int, str], ...], tuple[float, ...]]:
    """Exact values first: of rows that are equal but for rounding, few lie apart."""
    exact = tuple((0, "") if value is None else (1, repr(value)) for value in row if not isinstance(value, int | float))
    return exact, tuple(float(value) for value in row if isinstance(value, int | float))
