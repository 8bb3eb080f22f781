"""Compositions on recorded answers: score, cost and calls, computed by hand and equal to an online run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from coe.compose import (
    Aggregate,
    Cascade,
    Chain,
    Composition,
    ExpertCalls,
    Final,
    SelfConsistency,
    Single,
    Vote,
    WeightedVote,
)
from coe.errors import ConfigError
from coe.evaluation.recorded_answers import confidence_for_calls, decisions, replay, replay_composition
from coe.types import Answer, Usage
from routers.base import Estimate, RoutingDecision
from routers.decision import decide
from routers.errors import InvalidOutcomes, RouterError
from routers.outcomes.table import OutcomeTable
from routers.selectors import Dynamic, TopK

EXPERTS = ("a", "b", "c")
ANSWERS = {"a": ("A", "C", "", "D"), "b": ("B", "B", "A", ""), "c": ("B", "A", "A", "")}
RIGHT = ("B", "C", "A", "A")


def table(**changes) -> OutcomeTable:
    scores = np.array([[float(ANSWERS[e][i] == RIGHT[i]) for e in EXPERTS] for i in range(4)])
    given = {
        "query_ids": tuple("wxyz"),
        "prompts": ("one", "two", "three", "four"),
        "experts": EXPERTS,
        "scores": scores,
        "costs_usd": np.tile([1.0, 2.0, 4.0], (4, 1)),
        "answers": ANSWERS,
        **changes,
    }
    return OutcomeTable(**given)


class Same:
    """A router with the same estimate for every query."""

    requires: frozenset[str] = frozenset()

    def estimate(self, queries) -> Estimate:
        return Estimate(EXPERTS, np.tile([0.6, 0.6, 0.5], (len(queries), 1)))


ROUTER = Same()


def made(k: int):
    return decisions(ROUTER, table(), select=TopK(k))


def test_a_vote_by_hand() -> None:
    replayed = replay(table(), made(3), Vote())
    # B of b and c; all differ: a, which comes first; A of b and c; only a answers, and it is wrong
    assert replayed.experts == ("b", "a", "b", "a")
    assert replayed.scores.tolist() == [1, 1, 1, 0]
    assert replayed.calls.tolist() == [3] * 4 and replayed.rounds.tolist() == [1] * 4
    assert replayed.costs_usd is not None and replayed.costs_usd.tolist() == [7.0] * 4
    assert replayed.to_json() == {
        "n": 4,
        "accuracy": 0.75,
        "mean_cost_usd": 7.0,
        "mean_calls": 3.0,
        "mean_rounds": 1.0,
    }


def test_a_cascade_pays_only_for_those_it_asks() -> None:
    replayed = replay(table(), made(3), Cascade(confidence=0.9))
    # a and b are called in parallel. They differ; where only one of them answers, c alone cannot outvote it.
    assert replayed.calls.tolist() == [3, 3, 2, 2] and replayed.rounds.tolist() == [2, 2, 1, 1]
    agreed = table(answers={**ANSWERS, "b": ("A", "C", "A", "D")})
    paid = replay(agreed, made(3), Cascade(confidence=0.9))
    assert paid.calls.tolist() == [2, 2, 2, 2]
    assert paid.costs_usd is not None and paid.costs_usd.tolist() == [3.0] * 4


def test_single_needs_no_recorded_answers_and_a_vote_does() -> None:
    bare = table(answers=None, costs_usd=None)
    replayed = replay(bare, made(1), Single())
    assert replayed.scores.tolist() == bare.scores[:, 0].tolist()
    assert replayed.costs_usd is None and replayed.mean_cost_usd is None
    with pytest.raises(InvalidOutcomes, match="compares answers, but the table has none"):
        replay(bare, made(2), Vote())
    with pytest.raises(InvalidOutcomes, match="no answers of 'c'"):
        replay(table(answers={e: ANSWERS[e] for e in "ab"}), made(3), Vote())


def test_one_call_routes_decides_and_replays() -> None:
    voted = replay_composition(ROUTER, table(), composition="weighted-vote", settings={"options": 4}, k=3)
    assert voted.scores.tolist() == replay(table(), made(3), WeightedVote(options=4)).scores.tolist()
    best = replay_composition(ROUTER, table())
    assert (best.accuracy, best.mean_calls) == (0.25, 1.0)
    adaptive = replay_composition(ROUTER, table(), composition=Vote(), select={"kind": "dynamic", "p": 0.8}, k=3)
    assert adaptive.calls.tolist() == [2] * 4
    assert decisions(ROUTER, table(), select=Dynamic(0.8, 3)) == decide(ROUTER.estimate("1234"), select=Dynamic(0.8, 3))
    with pytest.raises(ConfigError, match="no composition 'vot'"):
        replay_composition(ROUTER, table(), composition="vot")


def test_experts_and_decisions_must_be_those_of_the_table() -> None:
    with pytest.raises(InvalidOutcomes, match="expert 'c' is called, but not in the table: a, b"):
        replay(table().with_experts(["a", "b"]), made(3), Vote())
    with pytest.raises(InvalidOutcomes, match="3 decisions for 4 queries"):
        replay(table(), made(3)[:3], Vote())


class Says:
    """A composition that writes its own answer."""

    def __init__(self, text: str) -> None:
        self.text = text

    def step(self, request, decision, done) -> ExpertCalls | Final:
        if not done:
            return Vote().step(request, decision, done)
        return Final(Answer("nobody", self.text, "stop", Usage(0, 0)))


def test_a_composed_text_is_scored_by_the_right_answer_or_by_an_equal_answer() -> None:
    composed: Composition = Says("A")
    known = table(frame=pd.DataFrame({"answer": RIGHT}))
    assert replay(known, made(3), composed).scores.tolist() == [0, 0, 1, 1]
    with pytest.raises(InvalidOutcomes, match="query 'z': the composed answer 'A' is no expert's recorded answer"):
        replay(table(), made(3), composed)
    said = table().select([0, 1, 2])
    assert replay(said, made(3)[:3], composed).scores.tolist() == [0, 0, 1]


def test_a_confidence_is_solved_for_a_budget_of_calls() -> None:
    agreed = table(answers={**ANSWERS, "b": ("A", "C", "A", "D")})
    solved = confidence_for_calls(agreed, made(3), Cascade, 2.5)
    assert replay(agreed, made(3), Cascade(solved)).mean_calls <= 2.5
    assert confidence_for_calls(agreed, made(3), Cascade, 3.0) == 1.0
    assert 0 < confidence_for_calls(agreed, made(3), Cascade, 1.0) <= 0.6
    with pytest.raises(RouterError, match="calls must be >= 1"):
        confidence_for_calls(agreed, made(3), Cascade, 0.9)


@pytest.mark.parametrize(
    ("composition", "asked"),
    [
        (Aggregate("z"), "Aggregate asks 'z' about what others answered"),
        (Aggregate("a"), "Aggregate asks 'a' about what others answered"),
        (Chain(), "Chain asks 'b' about what others answered"),
        (SelfConsistency(), "SelfConsistency asks 'a' for samples"),
    ],
)
def test_unrecorded_calls_cannot_be_replayed_and_the_error_names_the_remedy(
    composition: Composition, asked: str
) -> None:
    with pytest.raises(InvalidOutcomes, match=f"{asked}, which no table records.*coe eval --experts coe/<policy>"):
        replay(table(), made(3), composition)


def test_an_expert_that_was_drawn_twice_counts_twice_in_a_replay_and_is_paid_once() -> None:
    drawn = RoutingDecision(("a", "b", "a"), (0.4, 0.2, 0.4), (0.6, 0.6, 0.6), 0.6)
    replayed = replay(table(), [drawn] * 4, Vote())
    assert replayed.experts[:2] == ("a", "a") and replayed.calls.tolist() == [2] * 4
    assert replayed.costs_usd is not None and replayed.costs_usd.tolist() == [3.0] * 4
