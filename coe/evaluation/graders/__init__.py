"""Graders: how an answer becomes a score. To add one, write a file beside these and a line in `GRADERS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coe.evaluation.graders.base import GoldError, Grader, GraderModel
from coe.evaluation.graders.choice import Choice
from coe.evaluation.graders.json_equality import JsonEquality
from coe.evaluation.graders.number import Number
from coe.evaluation.graders.sql import SqlResult
from coe.evaluation.graders.text import Contains, Exact

GRADERS: Final[Mapping[str, type[GraderModel]]] = {
    "exact": Exact,
    "contains": Contains,
    "number": Number,
    "choice": Choice,
    "json": JsonEquality,
    "sql": SqlResult,
}
"""What a task may name as its `grader`."""

__all__ = ["GRADERS", "GoldError", "Grader", "GraderModel"]
