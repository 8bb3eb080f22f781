"""The demo's questions, and how it prints the answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coe.evaluation.graders import GRADERS
from coe.types import GenerateRequest
from examples.zoo.families import FAMILIES, TWO_SKILLS, Family, Row, Split
from routers.base import Message

console = Console(emoji=False, width=None if sys.stdout.isatty() else 114)
"""On a pipe the width is unknown: wide enough for a line per answer."""
AGGREGATE: Final = "aggregate"
"""The policy of latent.yaml whose experts exchange text."""


@dataclass(frozen=True, slots=True)
class Question:
    """A fresh question of a family. Neither the router nor the experts know which family."""

    id: int
    family: Family
    row: Row

    def request(self) -> GenerateRequest:
        """The question as a request, with the family's limit of new tokens."""
        return GenerateRequest(messages=(Message("user", self.row.prompt),), max_tokens=self.family.max_tokens)

    def grade(self, text: str) -> float:
        """The score of an answer in [0, 1]."""
        grader = GRADERS[self.family.grader](**self.family.grader_options)
        return grader.grade(text, {"answer": self.row.answer, **self.row.extras})


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one question, with the expert that gave it and the number of generated tokens."""

    expert: str
    text: str
    score: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Results:
    """Answers to the same questions: routed, by the best single expert, by the best expert of each true family."""

    questions: Sequence[Question]
    routed: Sequence[Result]
    best_single: Sequence[Result]
    oracle: Sequence[Result]

    def summary(self) -> dict[str, float | int]:
        """The accuracy figures of the last line."""
        return {
            "n": len(self.questions),
            "routed_accuracy": round(_mean(self.routed), 4),
            "best_single_accuracy": round(_mean(self.best_single), 4),
            "task_oracle_accuracy": round(_mean(self.oracle), 4),
            "experts_used": len({result.expert for result in self.routed}),
        }


@dataclass(frozen=True, slots=True)
class Composed:
    """Answers to questions that need two experts: of the best single expert, and of a policy that composes experts."""

    policy: str
    questions: Sequence[Question]
    best_single: Sequence[Result]
    composed: Sequence[Result]

    @property
    def exchange(self) -> str:
        """What the experts of the policy exchange: `text` or `latent`."""
        return "text" if self.policy == AGGREGATE else "latent"

    def summary(self) -> dict[str, float | int]:
        """The figures of the last line."""
        return {
            "two_skill_n": len(self.questions),
            "two_skill_best_single_right": _right(self.best_single),
            f"two_skill_{self.exchange}_right": _right(self.composed),
        }

    def line(self) -> str:
        """The figures in words."""
        best, composed = _right(self.best_single), _right(self.composed)
        return (
            f"{len(self.questions)} fresh questions that need two experts: {self.best_single[0].expert}, the best "
            f"single expert, answers {best} right, {self.policy} ({self.exchange}) {composed}"
        )

    def as_lines(self) -> list[dict[str, Any]]:
        """Every question with both answers, as JSON values."""
        compared = zip(self.questions, self.best_single, self.composed, strict=True)
        return [
            _of_question(question) | {"best_single": asdict(single), self.policy: asdict(composed)}
            for question, single, composed in compared
        ]


def fresh_two_skill_questions(n: int, seed: int) -> list[Question]:
    """`n` questions that need two experts."""
    return fresh_questions(n, seed, {name: pair.family for name, pair in TWO_SKILLS.items()})


def fresh_questions(n: int, seed: int, families: Mapping[str, Family] = FAMILIES) -> list[Question]:
    """`n` questions from held-out phrasings and words, spread evenly over the families and mixed."""
    count, rest = divmod(n, len(families))
    made = [
        (position, family, row)
        for i, family in enumerate(families.values())
        for position, row in enumerate(family.rows(Split.FRESH, count + (i < rest), seed=seed))
    ]
    made.sort(key=lambda item: item[0])
    return [Question(i, family, row) for i, (_, family, row) in enumerate(made)]


def answer_line(question: Question, result: Result, number: int, total: int) -> str:
    """One answer on one line, with rich markup: number, expert, whether it is right, query, answer."""
    right = "[green]yes[/]" if result.score == 1 else "[red]no [/]"
    query, text = _short(question.row.prompt, 52), _short(result.text, 30)
    return f"{number:4} of {total}  {result.expert:11} {right}  {escape(query.ljust(52))}  {escape(text)}"


def show(results: Results) -> None:
    """Print accuracy by family."""
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
    console.print()
    console.print(families)
    console.print(f"best single expert: {results.best_single[0].expert}")


def as_lines(results: Results) -> list[dict[str, Any]]:
    """Every question with its three answers, as JSON values."""
    compared = zip(results.questions, results.routed, results.best_single, results.oracle, strict=True)
    return [
        _of_question(question)
        | {
            "routed": asdict(routed),
            "best_single": asdict(best_single),
            "task_oracle": asdict(oracle),
        }
        for question, routed, best_single, oracle in compared
    ]


def _of_question(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "family": question.family.name,
        "prompt": question.row.prompt,
        "answer": question.row.answer,
    }


def _right(results: Sequence[Result]) -> int:
    return sum(result.score == 1 for result in results)


def _mean(results: Sequence[Result]) -> float:
    return sum(result.score for result in results) / len(results)


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
