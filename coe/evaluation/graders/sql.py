"""Grader of SQL: the answer is right when it returns the same rows as the right query."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from coe.evaluation.graders.base import GoldError, GraderModel, without_fence
from coe.evaluation.graders.sandbox import QueryError, Rows, database, select
from coe.evaluation.graders.sql_text import has_outer_order


class SqlResult(GraderModel):
    """1 when the answer's result equals that of the row's `answer`, on the database that its `schema_sql` builds.

    Order of rows counts only where the right query has an outermost ORDER BY (which should then be total: among ties
    SQLite may return any order). Order of columns counts, their names do not. 1 is 1.0. Code fences and a final
    semicolon are read over; anything but one SELECT within the bounds of `coe.evaluation.graders.sandbox` scores 0.

    tolerance: greatest difference between floats, relative above 1 and absolute below.
    """

    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        schema, gold = row.get("schema_sql"), row["answer"]
        if not isinstance(schema, str) or not isinstance(gold, str):
            raise GoldError("`schema_sql` and `answer` must be strings of SQL")
        right = _gold_rows(schema, gold)
        try:
            # A database of its own: nothing that one query does can reach the other.
            with database(schema) as connection:
                said = select(connection, _statement(answer), max_rows=len(right))
        except QueryError:
            return 0.0
        return float(self._same(said, right, ordered=has_outer_order(gold)))

    def _same(self, said: Rows, right: Rows, *, ordered: bool) -> bool:
        if len(said) != len(right):
            return False
        if ordered:
            return all(map(self._same_row, said, right))
        # Rows that differ by rounding may sort apart: each right row takes the first one that fits it.
        left = sorted(said, key=_sort_key)
        for row in sorted(right, key=_sort_key):
            found = next((index for index, other in enumerate(left) if self._same_row(other, row)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _same_row(self, said: tuple[object, ...], right: tuple[object, ...]) -> bool:
        return len(said) == len(right) and all(map(self._same_value, said, right))

    def _same_value(self, said: object, right: object) -> bool:
        if isinstance(said, float) or isinstance(right, float):
            return (
                isinstance(said, int | float)
                and isinstance(right, int | float)
                and math.isclose(said, right, rel_tol=self.tolerance, abs_tol=self.tolerance)
            )
        return type(said) is type(right) and said == right


def _statement(answer: str) -> str:
    return without_fence(answer).rstrip().removesuffix(";")


def _gold_rows(schema: str, gold: str) -> Rows:
    try:
        with database(schema) as connection:
            return select(connection, _statement(gold))
    except QueryError as error:
        raise GoldError(f"the right query cannot be run: {error}") from error


def _sort_key(row: tuple[object, ...]) -> tuple[tuple[int, float, str], ...]:
    return tuple(
        (1, float(value), "") if isinstance(value, int | float) else (0 if value is None else 2, 0.0, repr(value))
        for value in row
    )
