"""What the compositions that ask several experts share: who said what, and one Answer that stands for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from coe.compose.answer_key import AnswerKey
from coe.compose.base import Ask, Asks, Done, Final, nobody
from coe.errors import InvalidRequest
from coe.types import Answer, Failure, GenerateRequest, Timing, Usage
from routers.base import RoutingDecision


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one expert said.

    position: in the decision. round: asks of the same round ran side by side. key: None where it said nothing.
    """

    position: int
    round: int
    answer: Answer
    key: str | None


def asks(request: GenerateRequest, decision: RoutingDecision, positions: Iterable[int], *, round: int = 0) -> Asks:  # noqa: A002
    """The experts at these positions, side by side."""
    return Asks(tuple(Ask(f"{round}.{i}", decision.experts[i], request) for i in positions))


def only_one(request: GenerateRequest, decision: RoutingDecision) -> Asks:
    """The first expert alone: whatever it says is the answer, and may be streamed."""
    return replace(asks(request, decision, [0]), last=True)


def cast(done: Done, key: AnswerKey) -> list[Ballot]:
    """The ballots so far, best placed first; failures cast none."""
    ballots = []
    for name, outcome in done.items():
        round_, dot, position = name.partition(".")
        if dot and isinstance(outcome, Answer):
            ballots.append(Ballot(int(position), int(round_), outcome, key(outcome.text)))
    return sorted(ballots, key=lambda ballot: ballot.position)


def poll(
    request: GenerateRequest,
    decision: RoutingDecision,
    done: Done,
    key: AnswerKey,
    weights: Sequence[float],
    ahead: Mapping[str, float] = MappingProxyType({}),
) -> Asks | Final:
    """A vote's step: all experts side by side, then the strongest side. A decision of one expert is just asked."""
    if not done and decision.experts:
        several = len(decision.experts) > 1
        return asks(request, decision, range(len(decision.experts))) if several else only_one(request, decision)
    ballots = cast(done, key)
    if not ballots:
        raise give_up(decision, done)
    return elected(decision, ballots, strength(ballots, weights, ahead))


def rounds(done: Done) -> int:
    """How many rounds of asks there were."""
    return 1 + max((int(name.partition(".")[0]) for name in done if "." in name), default=-1)


def strength(
    ballots: Iterable[Ballot], weights: Sequence[float], ahead: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """Summed weight of each key that was named, in order of its best placed ballot; `ahead` is what keys begin with."""
    sums: dict[str, float] = {}
    for ballot in ballots:
        if ballot.key is not None:
            sums[ballot.key] = sums.get(ballot.key, ahead.get(ballot.key, 0.0)) + weights[ballot.position]
    return sums


def elected(decision: RoutingDecision, ballots: Sequence[Ballot], strength: Mapping[str, float]) -> Final:
    """The answer of the best expert on the strongest side, with the usage and the cost of all of them.

    Equally strong sides: the one of the best expert, by its utility, then by its place in the decision. Where nobody
    said anything, all are on one side.
    """
    most = max(strength.values(), default=-math.inf)
    sides: set[str | None] = {key for key, weight in strength.items() if math.isclose(weight, most, rel_tol=1e-12)} or {
        None
    }
    best = max(
        (ballot for ballot in ballots if ballot.key in sides), key=lambda b: (decision.scores[b.position], -b.position)
    )
    return Final(together(best.answer, ballots))


def together(answer: Answer, ballots: Sequence[Ballot]) -> Answer:
    """An answer with what all ballots took: tokens and costs added up, of each round the time of the slowest.

    The cost is unknown where one of them is.
    """
    every = [ballot.answer for ballot in ballots]
    costs = [one.cost_usd for one in every]
    return replace(
        answer,
        usage=Usage(sum(one.usage.prompt_tokens for one in every), sum(one.usage.completion_tokens for one in every)),
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        timing=_timing(ballots),
    )


def _timing(ballots: Sequence[Ballot]) -> Timing | None:
    slowest: dict[int, Timing] = {}
    for ballot in ballots:
        timing = ballot.answer.timing
        if timing is None:
            return None
        if ballot.round not in slowest or _seconds(timing) > _seconds(slowest[ballot.round]):
            slowest[ballot.round] = timing
    every = slowest.values()
    return Timing(sum(t.queue_s for t in every), sum(t.load_s for t in every), sum(t.engine_s for t in every))


def _seconds(timing: Timing) -> float:
    return timing.queue_s + timing.load_s + timing.engine_s


def give_up(decision: RoutingDecision, done: Done) -> Exception:
    """Why there is no answer: the request's own fault where an expert says so, else the last failure."""
    failures = [outcome.error for outcome in done.values() if isinstance(outcome, Failure)]
    wrong = [error for error in failures if isinstance(error, InvalidRequest)]
    if not failures:
        return nobody(decision)
    return (wrong or failures)[-1]
