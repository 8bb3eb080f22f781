"""The demo's questions, and the tables it prints of the answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from coe.evaluation.graders import GRADERS
from coe.types import GenerateRequest
from examples.zoo.families import FAMILIES, Family, Row, Split
from routers.base import Message

console = Console(width=None if sys.stdout.isatty() else 114)
"""On a pipe there is no width to ask for: wide enough for the tables."""


@dataclass(frozen=True, slots=True)
class Question:
    """A fresh question of a family; nobody who routes or answers is told which."""

    id: int
    family: Family
    row: Row

    def request(self) -> GenerateRequest:
        """What the service is asked."""
        return GenerateRequest(messages=(Message("user", self.row.prompt),), max_tokens=self.family.max_tokens)

    def grade(self, text: str) -> float:
        """The score of an answer in [0, 1]."""
        grader = GRADERS[self.family.grader](**self.family.grader_options)
        return grader.grade(text, {"answer": self.row.answer, **self.row.extras})


@dataclass(frozen=True, slots=True)
class Result:
    """What came back for one question; `tokens` were generated."""

    expert: str
    text: str
    score: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Results:
    """Answers to the same questions: routed, of the best single expert, of the expert of each one's true family."""

    questions: Sequence[Question]
    routed: Sequence[Result]
    best_single: Sequence[Result]
    oracle: Sequence[Result]

    def summary(self) -> dict[str, float | int]:
        """The figures of the last line."""
        return {
            "n": len(self.questions),
            "routed_accuracy": round(_mean(self.routed), 4),
            "best_single_accuracy": round(_mean(self.best_single), 4),
            "task_oracle_accuracy": round(_mean(self.oracle), 4),
            "experts_used": len({result.expert for result in self.routed}),
        }


def fresh_questions(n: int, seed: int) -> list[Question]:
    """`n` questions from held-out phrasings and words, spread evenly over the families and mixed."""
    count, rest = divmod(n, len(FAMILIES))
    made = [
        (position, family, row)
        for i, family in enumerate(FAMILIES.values())
        for position, row in enumerate(family.rows(Split.FRESH, count + (i < rest), seed=seed))
    ]
    made.sort(key=lambda item: item[0])
    return [Question(i, family, row) for i, (_, family, row) in enumerate(made)]


def show(results: Results) -> None:
    """Print every question with its answer, then a summary by family."""
    answers = Table(title="answers, model: auto", title_justify="left")
    for column, width in (("query", 50), ("expert", 11), ("answer", 34), ("right?", 6)):
        answers.add_column(column, width=width, no_wrap=True)
    for question, result in zip(results.questions, results.routed, strict=True):
        right = "[green]yes[/]" if result.score == 1 else "[red]no[/]"
        answers.add_row(_short(question.row.prompt, 50), result.expert, _short(result.text, 34), right)
    console.print(answers)

    families = Table(
        "family",
        "queries",
        "to its own expert",
        "routed",
        "best single",
        "task oracle",
        title="by family",
        title_justify="left",
    )
    for name in FAMILIES:
        rows = [i for i, question in enumerate(results.questions) if question.family.name == name]
        own = sum(results.routed[i].expert == results.oracle[i].expert for i in rows)
        scores = [
            _mean([answers[i] for i in rows]) for answers in (results.routed, results.best_single, results.oracle)
        ]
        families.add_row(name, str(len(rows)), str(own), *(f"{100 * score:.0f}%" for score in scores))
    everything = [_mean(answers) for answers in (results.routed, results.best_single, results.oracle)]
    own = sum(a.expert == b.expert for a, b in zip(results.routed, results.oracle, strict=True))
    families.add_section()
    families.add_row("all", str(len(results.questions)), str(own), *(f"{100 * score:.1f}%" for score in everything))
    console.print(families)
    console.print(f"best single expert: {results.best_single[0].expert}")


def _mean(results: Sequence[Result]) -> float:
    return sum(result.score for result in results) / len(results)


def _short(text: str, width: int) -> str:
    from rich.markup import escape

    line = " ".join(text.split())
    return escape(line if len(line) <= width else line[: width - 1] + "…")
