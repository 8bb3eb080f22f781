"""Self-consistency: one expert, several samples, reproducible seeds; and experts that occur twice in a decision."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_experts import REQUEST, answer, decision, run

from coe.compose import Cascade, Composition, ExpertCalls, SelfConsistency, Vote, WeightedVote, build_composition
from coe.compose.ballots import calls, drawn
from coe.errors import ConfigError, EngineError
from coe.types import GenerateRequest, Usage
from routers.base import RoutingDecision

THREE = decision(a=0.8, b=0.6, c=0.5)


def seeds(composition: Composition, request: GenerateRequest) -> list[int | None]:
    step = composition.step(request, THREE, {})
    assert isinstance(step, ExpertCalls) and not step.last and {call.expert for call in step.calls} == {"a"}
    assert {call.request.temperature for call in step.calls} == {0.7}
    return [call.request.seed for call in step.calls]


def test_what_the_best_expert_says_most_often_is_the_answer() -> None:
    says = {10: "A", 11: "The answer is B", 12: "B.", 13: "C", 14: "B"}
    final, rounds = run(SelfConsistency(), THREE, {"a": lambda r: says[r.seed]}, replace(REQUEST, seed=10))  # type: ignore[index]
    assert (final.text, rounds) == ("The answer is B", [["a"] * 5])
    assert (final.usage, final.cost_usd) == (Usage(50, 10), 5.0)
    even = {10: "A", 11: "B", 12: "B", 13: "A"}
    assert run(SelfConsistency(n=4), THREE, {"a": lambda r: even[r.seed]}, replace(REQUEST, seed=10))[0].text == "A"  # type: ignore[index]


def test_seeds_follow_the_requests_or_its_text() -> None:
    assert seeds(SelfConsistency(n=3), replace(REQUEST, seed=7)) == [7, 8, 9]
    assert seeds(SelfConsistency(n=3), replace(REQUEST, seed=2**63 - 1)) == [2**63 - 1, -(2**63), 1 - 2**63]
    own = seeds(SelfConsistency(n=2), REQUEST)
    assert None not in own and own == seeds(SelfConsistency(n=2), replace(REQUEST, id="another", stream=False))
    assert own != seeds(SelfConsistency(n=2), GenerateRequest(prompt="Which is it?"))
    assert seeds(SelfConsistency(n=2), replace(REQUEST, temperature=1.0)) == [None, None]


def test_samples_that_refuse_do_not_vote() -> None:
    says = ["No idea.", "I don't know.", "Paris", "I don't know.", "I cannot answer this question."]
    final, _ = run(SelfConsistency(), THREE, {"a": lambda r: says[r.seed]}, replace(REQUEST, seed=0))  # type: ignore[index]
    assert final.text == "Paris" and final.notes == ("a gave no answer (refusal)",)


def test_samples_that_fail_do_not_vote() -> None:
    says = {0: EngineError("down"), 1: "A", 2: "B", 3: "B", 4: EngineError("down")}
    final, _ = run(SelfConsistency(), THREE, {"a": lambda r: says[r.seed]}, replace(REQUEST, seed=0))  # type: ignore[index]
    assert final.text == "B" and final.notes == ("a failed: EngineError: down",)
    with pytest.raises(EngineError, match="down"):
        run(SelfConsistency(), THREE, {"a": EngineError("down")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "n must be a whole number of at least 2, got 1"),
        ({"temperature": 0}, r"temperature must be a number in \(0, 2\], got 0: at 0 every sample is the same"),
        ({"temperature": 3}, r"temperature must be a number in \(0, 2\]"),
        ({"key": "letter"}, "no answer key 'letter'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_composition("self-consistency", settings)


TWICE = RoutingDecision(("b", "a", "b"), (0.3, 0.4, 0.3), (0.6, 0.8, 0.6), 0.6, quality=(0.6, 0.8, 0.6))


@pytest.mark.parametrize("composition", [Vote(), WeightedVote()])
def test_an_expert_drawn_twice_is_asked_once_and_counts_twice(composition: Composition) -> None:
    final, rounds = run(composition, TWICE, {"a": "A", "b": "B"})
    assert (final.text, rounds, final.usage) == ("B", [["b", "a"]], Usage(20, 4))


def test_a_cascade_over_an_expert_that_was_drawn_twice_ends() -> None:
    assert run(Cascade(confidence=1.0), TWICE, {"a": "A", "b": "B"})[0].text == "B"
    same = RoutingDecision(("a", "a"), (0.5, 0.5), (0.8, 0.8), 0.8, quality=(0.8, 0.8))
    assert run(Cascade(), same, {"a": "A"}) == (answer("a", "A"), [["a"]])


def test_draws_that_sample_are_separate_calls() -> None:
    sampled = replace(REQUEST, temperature=1.0, seed=3)
    says = {3: "B", 4: "C"}
    final, rounds = run(Vote(), TWICE, {"a": "C", "b": lambda r: says[r.seed]}, sampled)  # type: ignore[index]
    assert (final.text, rounds, final.usage) == ("C", [["b", "a", "b"]], Usage(30, 6))
    assert [call.request.seed for call in calls(replace(sampled, seed=None), TWICE, range(3)).calls] == [None] * 3


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), st.booleans())
def test_draws_are_counted_whole_and_seeds_differ(experts: list[str], samples: bool) -> None:
    n = len(experts)
    of = RoutingDecision(tuple(experts), (1 / n,) * n, tuple(map(float, range(n))), 0.5)
    request = replace(REQUEST, temperature=0.5 * samples, seed=2**63 - 2)
    once, counts = drawn(request, of)
    assert sum(counts) == n and sum(once.weights) == pytest.approx(1)
    asked = [(call.expert, call.request.seed) for call in calls(request, once, range(len(once.experts))).calls]
    assert len(set(asked)) == len(asked) and {expert for expert, _ in asked} == set(experts)
    assert all(seed is not None and -(2**63) <= seed < 2**63 for _, seed in asked)
