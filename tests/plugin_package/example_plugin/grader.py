"""A grader: the first word of the answer must be correct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coe import GoldError, GraderModel


class FirstWord(GraderModel):
    """ignore_case: `Paris` is `paris`."""

    ignore_case: bool = True

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """1 if the first words agree."""
        if not isinstance(row["answer"], str) or not row["answer"].split():
            raise GoldError("`answer` must be a text with a word")
        said, right = answer.split()[:1], row["answer"].split()[:1]
        if self.ignore_case:
            said, right = [word.casefold() for word in said], [word.casefold() for word in right]
        return float(said == right)
