"""A chain: which expert drafts, which finishes, and what happens to a draft when the next expert fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
from recorded_experts import REQUEST, answer, decision, run

from coe.compose import Chain, ExpertCalls, build_composition, named_experts
from coe.compose.synthesis import refinement
from coe.errors import ConfigError, EngineError, InvalidRequest
from coe.types import GenerateRequest, Timing, Usage
from routers.base import RoutingDecision

THREE = decision(a=0.8, b=0.6, c=0.5)
DOWN = EngineError("it is down")


def more(letter: str):  # type: ignore[no-untyped-def]  # a function of a request
    """An expert that appends a letter to the draft in its prompt."""

    def call(request: GenerateRequest) -> str:
        drafted = request.messages[-1].content.split("A draft of the answer:\n")
        return (drafted[1].split("\n\n")[0] if len(drafted) > 1 else "") + letter

    return call


EACH = {name: more(name) for name in "abc"}


def test_the_best_has_the_last_word_or_drafts_or_the_order_is_given() -> None:
    assert run(Chain(), THREE, EACH)[0].text == "cba"
    assert run(Chain(order="falling"), THREE, EACH)[0].text == "abc"
    final, rounds = run(Chain(experts=["b", "c", "b"]), decision(a=1.0), EACH)
    assert final.text == "bcb" and rounds == [["b"], ["c"], ["b"]]
    assert run(Chain(), decision(b=0.4, a=0.8, c=0.6), EACH)[0].text == "bca"
    assert named_experts(Chain(experts=["b", "c"])) == ("b", "c") and named_experts(Chain()) == ()


def test_each_is_shown_the_request_and_the_draft_and_only_the_last_streams() -> None:
    steps = [Chain().step(REQUEST, THREE, done) for done in ({}, {"0.0": answer("c", "<think>so</think>4")})]
    assert all(isinstance(step, ExpertCalls) and not step.last for step in steps)
    assert isinstance(steps[1], ExpertCalls) and steps[1].calls[0].request == refinement(REQUEST, "4")
    last = Chain().step(REQUEST, THREE, {"0.0": answer("c", "4"), "1.0": answer("b", "5")})
    assert isinstance(last, ExpertCalls) and last.last and last.calls[0].expert == "a"
    mine = Chain(template="{draft}? {question}").step(REQUEST, THREE, {"0.0": answer("c", "4")})
    assert isinstance(mine, ExpertCalls) and mine.calls[0].request.messages[-1].content == "4? Which is it?"


def test_who_fails_or_says_nothing_is_skipped_and_named() -> None:
    final, _ = run(Chain(), THREE, {**EACH, "b": DOWN})
    assert final.text == "ca" and final.notes == ("b failed: EngineError: it is down",)
    assert run(Chain(), THREE, {**EACH, "c": DOWN})[0].text == "ba"
    assert run(Chain(), THREE, {**EACH, "b": "<think>so"})[0].notes == ("b gave an empty answer",)
    final, _ = run(Chain(), THREE, {**EACH, "a": DOWN})
    assert (final.expert, final.text, final.notes) == ("b", "cb", ("a failed: EngineError: it is down",))


def test_all_of_them_are_paid_for_one_after_the_other() -> None:
    says = {name: answer(name, name, 0.5, Timing(1, 0, 2)) for name in "abc"}
    final, _ = run(Chain(), THREE, says)
    assert (final.usage, final.cost_usd, final.timing) == (Usage(30, 6), 1.5, Timing(3, 0, 6))


def test_when_all_fail_the_last_error_is_raised_and_without_experts_nothing_is_called() -> None:
    with pytest.raises(EngineError, match="it is down"):
        run(Chain(), THREE, dict.fromkeys("abc", DOWN))
    with pytest.raises(InvalidRequest, match="no expert can take"):
        Chain(experts=["a", "b"]).step(REQUEST, RoutingDecision((), (), (), 0.0), {})


def test_the_deadline_is_that_of_each_but_the_last() -> None:
    request = replace(REQUEST, deadline_s=60.0)
    first = Chain(expert_deadline_s=2).step(request, decision(a=0.8, b=0.6), {})
    last = Chain(expert_deadline_s=2).step(request, decision(a=0.8, b=0.6), {"0.0": answer("b", "4")})
    assert isinstance(first, ExpertCalls) and first.calls[0].request.deadline_s == 2
    assert isinstance(last, ExpertCalls) and last.calls[0].request.deadline_s == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "random"}, "order must be 'rising' or 'falling', got 'random'"),
        ({"experts": "a"}, "a list of at least two names"),
        ({"experts": ["a"]}, "a list of at least two names"),
        ({"experts": ["a", 3]}, "each of `experts` must be the name of an expert, got 3"),
        ({"template": "{question} {answers}"}, "must contain {draft} exactly once"),
        ({"expert_deadline_s": "soon"}, "expert_deadline_s must be a number of seconds"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_composition("chain", settings)


def test_a_refusal_is_no_draft() -> None:
    says = {"c": "4", "b": "I don't know.", "a": more("!")}
    final, _ = run(Chain(), THREE, says)
    assert final.text == "4!" and final.notes == ("b gave no answer (refusal)",)
    step = Chain().step(REQUEST, THREE, {"0.0": answer("c", "I don't know.")})
    assert isinstance(step, ExpertCalls) and step.calls[0].request.messages == REQUEST.messages
