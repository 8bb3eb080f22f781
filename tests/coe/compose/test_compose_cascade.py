"""The answer-level cascade: when it stops, which experts it calls in parallel, and that it never changes the winner."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_experts import LISTED, REQUEST, answer, decision, prior, run

from coe.compose import Cascade, ExpertCalls, WeightedVote
from coe.compose.weighted_vote import evidence
from coe.errors import EngineError, InvalidRequest
from coe.types import Timing
from routers.base import RoutingDecision

THREE = decision(a=0.6, b=0.6, c=0.6)
AGREE = math.exp(2 * math.log(1.5 * 9))  # equal answers: evidence 2 * log(0.6 / 0.4 * 9)


def test_two_that_agree_spare_the_third() -> None:
    final, rounds = run(Cascade(confidence=0.9), THREE, {"a": "A", "b": "A", "c": "B"})
    assert rounds == [["a", "b"]]  # in parallel: one alone could not decide it
    assert (final.expert, final.cost_usd) == ("a", 2.0)
    assert pytest.approx(0.953, abs=1e-3) == AGREE / (AGREE + 9)  # 9 options not named


def test_two_that_differ_need_the_third() -> None:
    final, rounds = run(Cascade(confidence=0.9), THREE, {"a": "A", "b": "B", "c": "B"})
    assert rounds == [["a", "b"], ["c"]]
    assert (final.expert, final.cost_usd) == ("b", 3.0)


def test_one_answer_suffices_where_its_experts_estimate_does_and_is_streamed() -> None:
    sure = decision(a=0.95, b=0.6, c=0.6)
    step = Cascade(confidence=0.9).step(REQUEST, sure, {})
    assert isinstance(step, ExpertCalls) and step.last
    assert run(Cascade(confidence=0.9), sure, {"a": "A"})[1] == [["a"]]
    assert run(Cascade(confidence=0.9), sure, {"a": EngineError("down"), "b": "B", "c": "B"})[1] == [["a"], ["b", "c"]]


def test_no_expert_is_called_that_could_not_change_the_answer() -> None:
    four = decision(a=0.7, b=0.7, c=0.3, d=0.2)  # evidence 3.04, 3.04, 1.35, 0.81
    assert run(Cascade(confidence=1.0), four, {"a": "A", "b": "A", "c": "B", "d": "B"})[1] == [["a", "b"]]
    assert run(Cascade(confidence=1.0), four, {"a": "A", "b": "B", "c": "B", "d": "A"})[1] == [["a", "b"], ["c"]]


def test_who_says_nothing_settles_nothing() -> None:
    final, rounds = run(Cascade(confidence=0.9), THREE, {"a": "", "b": "A", "c": "A"})
    assert (final.expert, rounds) == ("b", [["a", "b"], ["c"]])


def test_a_refusal_of_the_expert_that_suffices_calls_the_others() -> None:
    sure, cascade = decision(a=0.95, b=0.6, c=0.6), Cascade(confidence=0.9)
    first = cascade.step(REQUEST, sure, {})
    assert isinstance(first, ExpertCalls) and first.last and first.held
    following = cascade.step(REQUEST, sure, {"0.0": answer("a", "I don't know.")})
    assert isinstance(following, ExpertCalls) and not following.last
    assert [call.expert for call in following.calls] == ["b", "c"]
    alone = cascade.step(REQUEST, decision(a=0.95), {})
    assert isinstance(alone, ExpertCalls) and alone.last and not alone.held


def test_failures_are_replaced_and_the_last_error_is_raised_when_all_fail() -> None:
    down = EngineError("down")
    assert run(Cascade(), THREE, {"a": down, "b": "B", "c": "B"})[0].expert == "b"
    with pytest.raises(EngineError, match="the last"):
        run(Cascade(), THREE, {"a": down, "b": down, "c": EngineError("the last")})
    with pytest.raises(InvalidRequest, match="no expert can take"):
        Cascade().step(REQUEST, RoutingDecision((), (), (), 0.0), {})


def test_the_time_is_that_of_the_slowest_of_each_round() -> None:
    timed = {
        "a": answer("a", "A", timing=Timing(0, 0, 2)),
        "b": answer("b", "B", timing=Timing(1, 2, 3)),
        "c": answer("c", "A", timing=Timing(0, 0.5, 4)),
    }
    assert run(Cascade(confidence=0.9), THREE, timed)[0].timing == Timing(1, 2.5, 7)


TEXTS = st.lists(st.sampled_from(["A", "B", "C", ""]), min_size=5, max_size=5)
QUALITIES = st.lists(st.floats(0, 1), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(qualities=QUALITIES, texts=TEXTS, confidence=st.floats(0.01, 1), options=st.integers(2, 12))
def test_side_by_side_takes_no_call_more_than_one_by_one(
    qualities: list[float], texts: list[str], confidence: float, options: int
) -> None:
    of = decision(**{f"e{i}": quality for i, quality in enumerate(qualities)})
    says = dict(zip(of.experts, texts, strict=False))
    cascade = Cascade(confidence, options=options)
    asked = [name for names in run(cascade, of, says)[1] for name in names]
    assert asked == list(of.experts[: len(asked)])
    assert asked == one_by_one(evidence(of, options), says, confidence, options)


def one_by_one(weights: list[float], says: dict[str, str], confidence: float, options: int) -> list[str]:
    """The experts called by a cascade that never calls two in parallel."""
    sides: dict[str, float] = {}
    for i, text in enumerate(says.values()):
        left = sum(weights[i + 1 :])
        if text:
            sides[text] = sides.get(text, 0.0) + weights[i]
        alone = i == 0 and stops([weights[0]], left, confidence, options)
        if alone or (sides and stops(list(sides.values()), left, confidence, options)):
            return list(says)[: i + 1]
    return list(says)


def stops(strengths: list[float], left: float, confidence: float, options: int) -> bool:
    first, *others = sorted(strengths, reverse=True)
    total = sum(math.exp(s) for s in strengths) + max(0, options - len(strengths))
    return first > max([0.0, *others]) + left + 1e-9 or math.exp(first) / total >= confidence - 1e-9


@settings(max_examples=50, deadline=None)
@given(qualities=QUALITIES, texts=TEXTS, options=st.integers(2, 12), favours=st.floats(-4, 4) | st.none())
def test_without_a_threshold_the_answer_is_that_of_the_weighted_vote(
    qualities: list[float], texts: list[str], options: int, favours: float | None
) -> None:
    of = decision(**{f"e{i}": quality for i, quality in enumerate(qualities)})
    says = dict(zip(of.experts, texts, strict=False))
    cascade = Cascade(1.0, options=options, prior=None if favours is None else prior(in_question=favours))
    if isinstance(step := cascade.step(LISTED, of, {}), ExpertCalls) and step.last:
        return  # a single answer is final, whatever it is and whatever the prior
    voted, _ = run(WeightedVote(options=options, prior=cascade.prior), of, says, LISTED)
    assert run(cascade, of, says, LISTED)[0].text == voted.text


def test_a_prior_may_settle_what_the_answers_leave_open() -> None:
    # b and c differ from a; where the prior agrees with a, they are not called
    for favours, rounds in ((0.0, [["a", "b"], ["c"]]), (3.0, [["a"]])):
        cascade = Cascade(0.9, prior=prior(in_question=favours))
        assert run(cascade, THREE, {"a": "B", "b": "A", "c": "A"}, LISTED)[1] == rounds
