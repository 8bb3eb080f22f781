"""Grader of multiple choice: extracts the option's letter from free text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from coe.answers.options import letter_in
from coe.evaluation.graders.base import GoldError, GraderModel


class MultipleChoice(GraderModel):
    """1 when the answer names the right option: `B`, `(b)`, `**B**`, `The answer is (B).`, `B) Paris`, `\\boxed{B}`.

    The last statement of the form "the answer is ..." counts first; then an option that is confirmed ("B is correct"),
    a leading letter, a last line that is a letter, and the only letter in the text. Letters that are ruled out ("not
    A", "A is wrong") do not count, and an answer that hedges ("A or B") scores 0. Statements are read in English,
    German, French, Spanish, Italian, Chinese, Japanese, Arabic, Hindi and Thai. A row's `choices`, a list of texts,
    bounds the letters, and an answer equal to one of them names its letter.

    letters: the letters of options, in order.
    """

    letters: Annotated[str, Field(pattern="^[A-Z]+$")] = "ABCDEFGHIJ"

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        choices = row.get("choices") or ()
        letters = self.letters[: len(choices)] if choices else self.letters
        gold = row["answer"]
        if not (isinstance(gold, str) and len(gold) == 1 and gold in letters):
            raise GoldError(f"`answer` must be one letter of {letters}, not {gold!r}")
        return float(letter_in(self.read(answer), letters, choices) == gold)
