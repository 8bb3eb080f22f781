"""Shared by the compositions that call several experts: calls, votes, and one Answer from many.

Ids of calls are `<round>.<position>`: calls of one round run side by side; the position is that in the decision, or a
word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from coe.compose.answer_key import AnswerKey
from coe.compose.base import Done, ExpertCall, ExpertCalls, Final, no_expert
from coe.compose.notes import failures, has_refused, in_order, refusals
from coe.errors import InvalidRequest, NotAllowed, Scope
from coe.seam import scope_of
from coe.types import Answer, Failure, GenerateRequest, Timing, Usage
from routers.base import RoutingDecision

_SEEDS = 2**64
"""Seeds are signed 64-bit integers."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """The answer of one expert, and its key.

    position: in the decision. key: None if the answer has none (see `answer_key`).
    """

    position: int
    answer: Answer
    key: str | None

    @property
    def refused(self) -> bool:
        """Whether the expert refused, or does not know."""
        return has_refused(self.answer)


def drawn(request: GenerateRequest, decision: RoutingDecision) -> tuple[RoutingDecision, tuple[int, ...]]:
    """The decision without calls that would repeat an answer, and how often each of its experts was drawn.

    If the request does not sample, an expert that was drawn twice is called once and its answer counts twice. If it
    samples, each draw is a call of its own (see `calls`).
    """
    counts = Counter(decision.experts)
    if request.temperature or len(counts) == len(decision.experts):
        return decision, (1,) * len(decision.experts)
    firsts = [decision.experts.index(expert) for expert in counts]
    weights = [sum(w for e, w in zip(decision.experts, decision.weights, strict=True) if e == name) for name in counts]
    once = replace(
        decision,
        experts=tuple(counts),
        weights=tuple(weights),
        scores=tuple(decision.scores[i] for i in firsts),
        quality=tuple(decision.quality[i] for i in firsts) if decision.quality else (),
    )
    return once, tuple(counts.values())


def calls(
    request: GenerateRequest,
    decision: RoutingDecision,
    positions: Iterable[int],
    *,
    round: int = 0,  # noqa: A002
) -> ExpertCalls:
    """Calls to the experts at these positions; repeated calls to one expert sample with different seeds."""
    experts = decision.experts
    return ExpertCalls(
        tuple(ExpertCall(f"{round}.{i}", experts[i], _again(request, experts[:i].count(experts[i]))) for i in positions)
    )


def _again(request: GenerateRequest, times: int) -> GenerateRequest:
    """The request with a seed of its own for each earlier call to the same expert."""
    if not times or request.seed is None:
        return request
    return replace(request, seed=(request.seed + times + _SEEDS // 2) % _SEEDS - _SEEDS // 2)


def only_one(request: GenerateRequest, decision: RoutingDecision) -> ExpertCalls:
    """A call to the first expert alone; its answer is final and may stream."""
    return replace(calls(request, decision, [0]), last=True)


def cast(done: Done, key: AnswerKey) -> list[Ballot]:
    """The ballots so far, in order of position; failures have none."""
    ballots = []
    for name, outcome in done.items():
        _, _, position = name.partition(".")
        if position.isdecimal() and isinstance(outcome, Answer):
            ballots.append(Ballot(int(position), outcome, key(outcome.text)))
    return sorted(ballots, key=lambda ballot: ballot.position)


def poll(
    request: GenerateRequest,
    decision: RoutingDecision,
    done: Done,
    key: AnswerKey,
    weights: Sequence[float],
    ahead: Mapping[str, float] = MappingProxyType({}),
) -> ExpertCalls | Final:
    """The step of a vote: all experts side by side, then the strongest key. A decision of one expert needs no vote."""
    if not done and decision.experts:
        several = len(decision.experts) > 1
        return calls(request, decision, range(len(decision.experts))) if several else only_one(request, decision)
    ballots = cast(done, key)
    if not ballots:
        raise give_up(decision, done)
    return elected(decision, ballots, strength(ballots, weights, ahead), done)


def rounds(done: Done) -> int:
    """The number of rounds of calls so far."""
    return 1 + max((int(name.partition(".")[0]) for name in done if "." in name), default=-1)


def strength(
    ballots: Iterable[Ballot], weights: Sequence[float], ahead: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """Summed weight of each key, in order of its first ballot. ahead: initial weights of keys."""
    sums: dict[str, float] = {}
    for ballot in ballots:
        if ballot.key is not None:
            sums[ballot.key] = sums.get(ballot.key, ahead.get(ballot.key, 0.0)) + weights[ballot.position]
    return sums


def elected(decision: RoutingDecision, ballots: Sequence[Ballot], strength: Mapping[str, float], done: Done) -> Final:
    """The answer of the best expert with the strongest key, with the usage and cost of all calls.

    Ties go to the expert with the highest utility, then the first in the decision. If no answer has a key, all answers
    count as one side, of which a refusal is returned only if all refuse.
    """
    most = max(strength.values(), default=-math.inf)
    sides: set[str | None] = {key for key, weight in strength.items() if math.isclose(weight, most, rel_tol=1e-12)} or {
        None
    }
    voters = [ballot for ballot in ballots if ballot.key in sides]
    best = max(
        [ballot for ballot in voters if not ballot.refused] or voters,
        key=lambda b: (decision.scores[b.position], -b.position),
    )
    return Final(together(best.answer, done, (*failures(done), *refusals(done))))


def together(answer: Answer, done: Done, notes: tuple[str, ...]) -> Answer:
    """An answer with the totals of all calls: tokens, cost, and the time of the slowest call of each round.

    The cost is unknown (None) if that of one call is.
    """
    answered = [(name, outcome) for name, outcome in in_order(done) if isinstance(outcome, Answer)]
    every = [one for _, one in answered]
    costs = [one.cost_usd for one in every]
    return replace(
        answer,
        usage=Usage.total(one.usage for one in every),
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        timing=_timing(answered),
        notes=tuple(dict.fromkeys((*notes, *answer.notes))),
    )


def _timing(answered: Sequence[tuple[str, Answer]]) -> Timing | None:
    slowest: dict[str, Timing] = {}
    for name, answer in answered:
        round_, timing = name.partition(".")[0], answer.timing
        if timing is None:
            return None
        if round_ not in slowest or _seconds(timing) > _seconds(slowest[round_]):
            slowest[round_] = timing
    every = slowest.values()
    return Timing(sum(t.queue_s for t in every), sum(t.load_s for t in every), sum(t.engine_s for t in every))


def _seconds(timing: Timing) -> float:
    return timing.queue_s + timing.load_s + timing.engine_s


def give_up(decision: RoutingDecision, done: Done) -> Exception:
    """The error if there is no answer, by the rule of failure (`coe.errors`).

    An error of scope REQUEST if there is one; else the last failure of an expert that did not reject the request, since
    the request may be right; else, where every expert rejects it, the last rejection.
    """
    errors = [outcome.error for _, outcome in in_order(done) if isinstance(outcome, Failure)]
    if not errors:
        return no_expert(decision)
    about_the_request = [error for error in errors if scope_of(error) is Scope.REQUEST]
    failed = [error for error in errors if not isinstance(error, InvalidRequest)]
    rejected = [error for error in errors if not isinstance(error, NotAllowed)]
    return (about_the_request or failed or rejected or errors)[-1]
