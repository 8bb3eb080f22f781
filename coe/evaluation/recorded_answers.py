"""Compositions over recorded answers: the score and cost of a vote or a cascade, from the answers of a table.

    replayed = replay_composition(router, table, composition="weighted-vote", select="dynamic")
    print(replayed.accuracy, replayed.mean_calls)

Recorded answers drive the same `Composition.step` that serves and batches, so the measured code is the code that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coe.compose import Composition, ExpertCall, ExpertCalls, Final, build_composition, next_step
from coe.errors import CoeError
from coe.types import Answer, Failure, GenerateRequest, Usage
from routers.base import Message, Router, RoutingDecision
from routers.conversation import estimate
from routers.decision import Utility, decide
from routers.errors import InvalidOutcomes, RouterError
from routers.outcomes.table import OutcomeTable
from routers.selectors import Selector, TopK, build_selector

BATCH = 1024
"""Queries that are routed in one call."""
_BISECTIONS = 12

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CompositionResults:
    """The results of a composition on n queries.

    Attributes:
        scores: (n,) score of the final answer, in [0, 1].
        costs_usd: (n,) summed over all calls; None where the table has no costs.
        calls: (n,) number of expert calls.
        rounds: (n,) number of steps with calls; 1 where all calls run in parallel.
        experts: n names, the expert whose answer was returned.
    """

    scores: Floats
    costs_usd: Floats | None
    calls: NDArray[np.int64]
    rounds: NDArray[np.int64]
    experts: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def mean_calls(self) -> float:
        """Mean number of expert calls for a query."""
        return float(self.calls.mean())

    @property
    def mean_cost_usd(self) -> float | None:
        """Mean cost of a query, over all its calls."""
        return None if self.costs_usd is None else float(self.costs_usd.mean())

    def to_json(self) -> dict[str, Any]:
        """The means, as JSON values."""
        return {
            "n": len(self.scores),
            "accuracy": self.accuracy,
            "mean_cost_usd": self.mean_cost_usd,
            "mean_calls": self.mean_calls,
            "mean_rounds": float(self.rounds.mean()),
        }


def replay_composition(
    router: Router,
    table: OutcomeTable,
    *,
    composition: str | Composition = "single",
    settings: Mapping[str, Any] | None = None,
    select: str | Mapping[str, Any] | Selector | None = None,
    k: int | None = None,
    utility: Utility = Utility(),
) -> CompositionResults:
    """Route every query of a table and replay a composition of the chosen experts.

    Args:
        router: fitted, on other rows than these.
        table: with recorded answers (`answer::<expert>`) if the composition compares answers.
        composition: a name in `coe.compose.COMPOSITIONS` with its `settings`, or a built one.
        select: a selector, its name, or its document (`routers.selectors.build_selector`).
        k: largest number of experts; without `select`, the k of highest utility.

    Raises:
        ConfigError, InvalidSettings: the composition or selector, or its settings, are unknown or wrong.
        InvalidOutcomes: the table lacks the answers of an expert that is called.
    """
    chosen = composition if not isinstance(composition, str) else build_composition(composition, settings)
    return replay(table, decisions(router, table, select=_selector(select, k), utility=utility), chosen)


def decisions(
    router: Router, table: OutcomeTable, *, select: Selector | None = None, utility: Utility = Utility()
) -> list[RoutingDecision]:
    """The decision of each of the n queries, among the experts of the table."""
    queries, made = table.queries(), list[RoutingDecision]()
    for start in range(0, len(queries), BATCH):
        estimated = estimate(router, queries[start : start + BATCH])
        made += decide(estimated, utility=utility, select=select, allowed=table.experts)
    return made


def replay(table: OutcomeTable, decisions: Sequence[RoutingDecision], composition: Composition) -> CompositionResults:
    """Drive a composition over n decisions with the recorded answers of their experts.

    The score is that of the expert whose answer is returned. A text that the composition made itself scores 1 or 0 by
    the table's column `answer`, else as the expert with the same text. A table without answers replays compositions
    that compare none (`single`).

    Raises:
        InvalidOutcomes: there are not as many decisions as queries; an expert or its answers are not in the table; a
            composed answer cannot be scored; or the composition makes calls that no table records (`aggregate`,
            `chain`, `self-consistency`).
    """
    if len(decisions) != len(table):
        raise InvalidOutcomes(f"{len(decisions)} decisions for {len(table)} queries")
    recorded = _Recorded(table)
    done = [recorded.run(row, decision, composition) for row, decision in enumerate(decisions)]
    costs = np.array([[run.cost_usd for run in done]])
    return CompositionResults(
        scores=np.array([run.score for run in done]),
        costs_usd=None if table.costs_usd is None else costs[0].astype(np.float64),
        calls=np.array([run.calls for run in done], dtype=np.int64),
        rounds=np.array([run.rounds for run in done], dtype=np.int64),
        experts=tuple(run.expert for run in done),
    )


def confidence_for_calls(
    table: OutcomeTable,
    decisions: Sequence[RoutingDecision],
    make: Callable[[float], Composition],
    calls: float,
) -> float:
    """The highest confidence at which a composition asks at most `calls` experts a query on average, by bisection.

    The same queries at a higher confidence must not take fewer calls, as is so of `cascade`.

    Args:
        table, decisions: of training rows, by estimates that are out-of-fold.
        make: a composition of that confidence, as `lambda c: Cascade(confidence=c)`.

    Raises:
        RouterError: a budget of less than one call a query.
    """
    if not calls >= 1:
        raise RouterError(f"every query asks one expert at least: calls must be >= 1, got {calls}")
    low, high = 0.0, 1.0
    if replay(table, decisions, make(high)).mean_calls <= calls:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if replay(table, decisions, make(middle)).mean_calls <= calls else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class _Run:
    score: float
    cost_usd: float | None
    calls: int
    rounds: int
    expert: str


class _Recorded:
    """Answers calls from a table."""

    def __init__(self, table: OutcomeTable) -> None:
        self._table = table
        self._column = {name: column for column, name in enumerate(table.experts)}
        self._right = None
        if table.frame is not None and "answer" in table.frame:
            self._right = table.labels("answer")

    def run(self, row: int, decision: RoutingDecision, composition: Composition) -> _Run:
        talks = self._table.conversations
        request = GenerateRequest(
            messages=(talks[row] if talks else ()) or (Message("user", self._table.prompts[row]),)
        )
        done: dict[str, Answer | Failure] = {}
        rounds = 0
        while isinstance(step := self._step(row, composition, request, decision, done), ExpertCalls):
            if self._table.answers is None and not step.last:
                raise InvalidOutcomes("this composition compares answers, but the table has none: `answer::<expert>`")
            for call in step.calls:
                self._check(call, request, composition)
                done[call.id] = self._answer(row, call.expert)
            rounds += 1
        costs = [outcome.cost_usd for outcome in done.values() if isinstance(outcome, Answer)]
        return _Run(
            score=self._score(row, step.answer),
            cost_usd=None if self._table.costs_usd is None else sum(cost or 0.0 for cost in costs),
            calls=len(done),
            rounds=rounds,
            expert=step.answer.expert,
        )

    def _step(
        self,
        row: int,
        composition: Composition,
        request: GenerateRequest,
        decision: RoutingDecision,
        done: Mapping[str, Answer | Failure],
    ) -> ExpertCalls | Final:
        try:
            return next_step(composition, request, decision, done)
        except CoeError as error:
            raise InvalidOutcomes(f"query {self._table.query_ids[row]!r} cannot be replayed: {error}") from error

    @staticmethod
    def _check(call: ExpertCall, recorded: GenerateRequest, composition: Composition) -> None:
        """Raises InvalidOutcomes if a call is not the one that its recorded answer belongs to."""
        if (call.request.messages, call.request.temperature) == (recorded.messages, recorded.temperature):
            return
        what = "for samples" if call.request.temperature else "about what others answered"
        raise InvalidOutcomes(
            f"{type(composition).__name__} asks {call.expert!r} {what}, which no table records: only votes can be "
            "replayed. Measure it on live experts: coe eval --experts coe/<policy>, with a policy of this composition"
        )

    def _answer(self, row: int, expert: str) -> Answer:
        table = self._table
        column = self._column.get(expert)
        if column is None:
            raise InvalidOutcomes(f"expert {expert!r} is called, but not in the table: {', '.join(table.experts)}")
        if table.answers is not None and expert not in table.answers:
            raise InvalidOutcomes(f"no answers of {expert!r}: the table has no column `answer::{expert}`")
        return Answer(
            expert,
            text=table.answers[expert][row] if table.answers is not None else "",
            finish_reason="stop",
            usage=Usage(0, 0 if table.tokens is None else int(table.tokens[row, column])),
            cost_usd=None if table.costs_usd is None else float(table.costs_usd[row, column]),
        )

    def _score(self, row: int, answer: Answer) -> float:
        table, column = self._table, self._column.get(answer.expert)
        if column is not None and (table.answers is None or table.answers[answer.expert][row] == answer.text):
            return float(table.scores[row, column])
        if self._right is not None:
            return float(answer.text == self._right[row])
        for name, texts in (table.answers or {}).items():
            if texts[row] == answer.text:
                return float(table.scores[row, self._column[name]])
        raise InvalidOutcomes(
            f"query {table.query_ids[row]!r}: the composed answer {answer.text[:60]!r} is no expert's recorded answer, "
            "and the table has no column `answer` to compare it with"
        )


def _selector(select: str | Mapping[str, Any] | Selector | None, k: int | None) -> Selector:
    if select is None:
        return TopK(1 if k is None else k)
    if isinstance(select, str | Mapping):
        return build_selector(select, **({} if k is None else {"k": k}))
    return select
