"""The interface of graders: from an answer and its row to a score in [0, 1]."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, SupportsFloat

from pydantic import BaseModel, ConfigDict

from coe.answers.text import MAX_CHARS
from coe.answers.thinking import without_thoughts
from coe.errors import TaskError
from coe.seam import is_interrupt, text_of


class GoldError(ValueError):
    """The row's right answer is unusable; loading a task turns this into a TaskError with its line."""


class Grader(Protocol):
    """Scores one answer against the row's `answer`."""

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """The score in [0, 1]; an answer that cannot be read scores 0 and never raises.

        Raises:
            GoldError: the row's right answer is unusable. Loading a task grades "" to find this.
        """
        ...


class GraderModel(BaseModel):
    """Base of the graders that a task names. Its fields are the `grader_options`; unknown ones are refused.

    keep_thinking: grade the thinking text of an answer as a part of it; by default it is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_thinking: bool = False

    def read(self, answer: str) -> str:
        """The text of an answer that is graded: at most its last `MAX_CHARS` characters."""
        answer = answer[-MAX_CHARS:]
        return answer if self.keep_thinking else _without_thoughts(answer)

    @abstractmethod
    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""


def score_of(grader: Grader, answer: str, row: Mapping[str, Any]) -> float:
    """The grader's score of one answer without its thinking text, checked: a grader may come from another package.

    Raises:
        GoldError: the row's right answer is unusable.
        TaskError: the grader raised something else, or returned no number in [0, 1].
    """
    shown = f"grader {type(grader).__module__}.{type(grader).__qualname__}"
    try:
        read = grader.read(answer) if isinstance(grader, GraderModel) else _without_thoughts(answer)
        score: Any = grader.grade(read, row)
    except GoldError:
        raise
    except BaseException as error:  # third-party code may raise anything
        if is_interrupt(error):
            raise
        raise TaskError(f"{shown}: `grade` raised {type(error).__name__}: {text_of(error)}") from error
    number = float(score) if isinstance(score, SupportsFloat) else math.nan
    if not 0 <= number <= 1:
        raise TaskError(f"{shown}: `grade` must return a number in [0, 1], not {score!r:.80}")
    return number


def _without_thoughts(answer: str) -> str:
    """The answer without its thinking text; unchanged, blanks included, if it has none."""
    without = without_thoughts(answer)
    return answer if without == answer.strip() else without


def gold_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answers of a row whose `answer` is a string, or a list of right strings."""
    gold = row["answer"]
    texts = tuple(gold) if isinstance(gold, list) else (gold,)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise GoldError(f"`answer` must be a non-empty string, or a list of them, not {gold!r}")
    return texts


def without_fence(text: str) -> str:
    """The content of a Markdown code block if the text is exactly one, else the text, stripped."""
    text = text.strip()
    if not text.startswith("```"):
        return text
    body = text.removeprefix("```").removesuffix("```")
    first, newline, rest = body.partition("\n")
    is_language = bool(newline) and first.strip().isalnum()
    return (rest if is_language else body).strip()
