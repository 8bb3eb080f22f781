"""Aggregation: what the aggregator reads, which answers are left out, what happens if it fails, and the total usage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_experts import REQUEST, Said, answer, decision, run

from coe.compose import Aggregate, ExpertCalls, Final, Without, build_composition, named_experts, without
from coe.compose.synthesis import TEMPLATE, synthesis
from coe.errors import ConfigError, ContextLengthExceeded, DeadlineExceeded, EngineError, NotAllowed, WeightsError
from coe.types import Answer, Failure, GenerateRequest, Timing, Usage
from routers.base import Message, RoutingDecision

THREE = decision(a=0.8, b=0.6, c=0.5)
LATE, DOWN = DeadlineExceeded("'b' did not finish within 2 s"), EngineError("it is down")


def shown(request: GenerateRequest) -> str:
    """An aggregator that returns its prompt."""
    return request.messages[-1].content


def holding(tokens: int, expert: str = "z") -> Callable[[GenerateRequest], Said]:
    """An aggregator with a context of so many words that returns its prompt and counts a token per word."""

    def call(request: GenerateRequest) -> Said:
        words, wanted = len(shown(request).split()), request.max_tokens or 1
        if words + wanted > tokens:
            return ContextLengthExceeded(expert, prompt_tokens=words, max_tokens=wanted, context_length=tokens)
        return Answer(expert, shown(request), "stop", Usage(words, 1), 0.5)

    return call


def test_the_aggregator_sees_the_request_and_all_answers_without_their_thoughts() -> None:
    says = {"a": "<think>hm</think> 4", "b": "5", "c": "it is 4", "z": shown}
    final, rounds = run(Aggregate("z"), THREE, says)
    assert rounds == [["a", "b", "c"], ["z"]]
    assert final.expert == "z" and final.notes == ()
    assert final.text == shown(synthesis(REQUEST, ["4", "5", "it is 4"]))
    mine, _ = run(Aggregate("z", template="{answers}\n? {question}"), THREE, says)
    assert mine.text == "1. 4\n2. 5\n3. it is 4\n? Which is it?"


def test_the_aggregators_call_streams_and_the_others_do_not() -> None:
    first = Aggregate("z").step(REQUEST, THREE, {})
    assert isinstance(first, ExpertCalls) and not first.last and [call.request for call in first.calls] == [REQUEST] * 3
    second = Aggregate("z").step(REQUEST, THREE, {"0.0": answer("a", "4"), "0.1": Failure("b", LATE)})
    assert isinstance(second, ExpertCalls) and second.last and len(second.calls) == 1
    assert second.notes == ("b failed: DeadlineExceeded: 'b' did not finish within 2 s",)


def test_tokens_cost_and_time_are_those_of_everybody() -> None:
    says = {
        "a": answer("a", "A", 0.5, Timing(0, 0, 2)),
        "b": answer("b", "B", 0.25, Timing(1, 2, 3)),
        "c": answer("c", "B", 0.125, Timing(0, 0, 4)),
        "z": answer("z", "B", 0.0625, Timing(0, 1, 1)),
    }
    final, _ = run(Aggregate("z"), THREE, says)
    assert (final.usage, final.cost_usd, final.timing) == (Usage(40, 8), 0.9375, Timing(1, 3, 4))
    unpriced, _ = run(Aggregate("z"), THREE, {**says, "z": answer("z", "B", None)})
    assert unpriced.cost_usd is None


def test_who_fails_or_says_nothing_is_left_out_and_named() -> None:
    final, _ = run(Aggregate("z"), THREE, {"a": "<think>too long", "b": LATE, "c": "4", "z": shown})
    assert final.text == shown(synthesis(REQUEST, ["4"]))
    assert final.notes == ("b failed: DeadlineExceeded: 'b' did not finish within 2 s", "a gave an empty answer")
    assert final.usage == Usage(30, 6)  # of a, c and z


def test_refusals_are_not_shown_to_the_aggregator() -> None:
    says = {"a": "I don't know.", "b": "4", "c": "I'm sorry, I can't help with that.", "z": shown}
    final, _ = run(Aggregate("z"), THREE, says)
    assert final.text == shown(synthesis(REQUEST, ["4"]))
    assert final.notes == ("a gave no answer (refusal)", "c gave no answer (refusal)")
    all_refuse, rounds = run(Aggregate("z"), THREE, dict.fromkeys("abc", "I don't know.") | {"z": shown})
    assert (all_refuse.expert, all_refuse.text, rounds) == ("a", "I don't know.", [["a", "b", "c"]])


def test_notes_do_not_tell_where_the_files_of_a_server_are() -> None:
    final, _ = run(Aggregate("z"), THREE, {"a": WeightsError("/srv/secret is cut"), "b": "1", "c": "2", "z": "1"})
    assert final.notes == ("a failed: WeightsError",)


def test_when_all_fail_the_error_is_that_of_a_vote() -> None:
    wrong = ContextLengthExceeded("b", prompt_tokens=9, max_tokens=1, context_length=8)
    with pytest.raises(DeadlineExceeded):
        run(Aggregate("z"), THREE, {"a": DOWN, "b": DOWN, "c": LATE})
    with pytest.raises(EngineError):
        run(Aggregate("z"), THREE, {"a": DOWN, "b": wrong, "c": DOWN})
    with pytest.raises(ContextLengthExceeded):
        run(Aggregate("z"), THREE, {"a": wrong, "b": wrong, "c": wrong})


def test_where_the_aggregator_fails_most_of_the_experts_decide() -> None:
    says = {"a": "C", "b": "<think>C?</think>The answer is B", "c": "B", "z": DOWN}
    final, _ = run(Aggregate("z"), THREE, says)
    assert final.expert == "b" and final.usage == Usage(30, 6) and final.cost_usd == 3
    assert final.notes == ("z could not aggregate: EngineError: it is down; the answer is the majority of the experts",)
    assert run(Aggregate("z"), THREE, {**says, "c": "D"})[0].expert == "a"  # all differ: the best one's


def test_an_aggregator_that_is_recruited_too_answers_twice() -> None:
    final, rounds = run(Aggregate("b"), THREE, {"a": "4", "b": lambda r: "5" if r == REQUEST else shown(r), "c": "4"})
    assert rounds == [["a", "b", "c"], ["b"]] and final.text == shown(synthesis(REQUEST, ["4", "5", "4"]))
    assert final.usage == Usage(40, 8)


def test_no_expert_aggregates_only_its_own_answer() -> None:
    alone = Aggregate("a").step(REQUEST, decision(a=0.9), {})
    assert isinstance(alone, ExpertCalls) and alone.last
    assert run(Aggregate("a"), decision(a=0.9), {"a": "4"}) == (answer("a", "4"), [["a"]])
    final, rounds = run(Aggregate("a"), THREE, {"a": "4", "b": DOWN, "c": DOWN})
    assert (final.text, rounds) == ("4", [["a", "b", "c"]]) and len(final.notes) == 2
    twice = RoutingDecision(("a", "a", "b"), (0.4, 0.4, 0.2), (0.8, 0.8, 0.5), 0.8)
    assert run(Aggregate("a"), twice, {"a": "4", "b": ""})[0].notes == ("b gave an empty answer",)
    assert run(Aggregate("z"), decision(a=0.9), {"a": "4", "z": "five"})[0].text == "five"


def test_without_answers_there_is_nothing_to_aggregate() -> None:
    final, rounds = run(Aggregate("z"), THREE, {"a": "", "b": " ", "c": ""})
    assert (final.expert, final.text, rounds) == ("a", "", [["a", "b", "c"]])


def test_the_label_picks_the_aggregator() -> None:
    by_label = Aggregate({"maths": "m", "default": "z"})
    says = {"a": "4", "b": "4", "c": "4", "m": "four", "z": "5"}
    assert run(by_label, replace(THREE, label="maths"), says)[0].expert == "m"
    assert run(by_label, replace(THREE, label="law"), says)[0].expert == "z"
    assert run(by_label, THREE, says)[0].expert == "z"
    assert named_experts(by_label) == ("m", "z") and named_experts(build_composition("vote")) == ()


def test_deadline_and_length_are_the_experts_own() -> None:
    request = replace(REQUEST, max_tokens=9, deadline_s=60.0)
    composition = Aggregate("z", expert_deadline_s=2, max_answer_tokens=300)
    first = composition.step(request, THREE, {})
    assert isinstance(first, ExpertCalls)
    assert {(call.request.deadline_s, call.request.max_tokens) for call in first.calls} == {(2, 300)}
    second = composition.step(request, THREE, {"0.0": answer("a", "4")})
    assert isinstance(second, ExpertCalls) and second.calls[0].request.max_tokens == 9
    assert second.calls[0].request.deadline_s == 60


def test_an_expert_that_was_drawn_twice_is_asked_once_and_shown_twice() -> None:
    twice = RoutingDecision(("a", "a", "b"), (0.4, 0.4, 0.2), (0.8, 0.8, 0.5), 0.8)
    final, rounds = run(Aggregate("z"), twice, {"a": "4", "b": "5", "z": shown})
    assert rounds == [["a", "b"], ["z"]] and final.text == shown(synthesis(REQUEST, ["4", "4", "5"]))
    sampled = replace(REQUEST, temperature=0.7, seed=7)
    step = Aggregate("z").step(sampled, twice, {})
    assert isinstance(step, ExpertCalls) and [(call.expert, call.request.seed) for call in step.calls] == [
        ("a", 7),
        ("a", 8),
        ("b", 7),
    ]


def test_answers_that_do_not_fit_are_cut_the_long_ones_only_and_the_notes_say_so() -> None:
    long = " ".join(f"w{i}" for i in range(400))
    says = {"a": "short and right", "b": long, "c": DOWN, "z": holding(300)}
    final, rounds = run(Aggregate("z"), THREE, says)
    assert rounds[0] == ["a", "b", "c"] and 2 <= len(rounds[1:]) <= 4
    assert "1. short and right\n" in final.text and "w0 w1" in final.text and final.text.count("[cut]") == 1
    failed, cut = final.notes
    assert failed == "c failed: EngineError: it is down"
    assert cut.startswith("the aggregator saw the first ") and cut.endswith(
        "characters of the answers of b: the context of z holds 300 tokens"
    )
    assert len(final.text.split()) <= 300 - 300 // 4  # there is room left for the answer
    assert final.usage.prompt_tokens == 20 + len(final.text.split())


def test_a_limit_that_the_request_states_is_kept_free() -> None:
    request = replace(REQUEST, max_tokens=100)
    long = "word " * 400
    final, _ = run(Aggregate("z"), THREE, {"a": long, "b": long, "c": long, "z": holding(300)}, request)
    assert final.expert == "z" and final.text.count("[cut]") == 3 and len(final.text.split()) <= 200


def test_a_question_that_alone_does_not_fit_leaves_it_to_the_experts() -> None:
    asked = GenerateRequest(messages=(Message("user", "why " * 200),))
    final, rounds = run(Aggregate("z"), THREE, {"a": "A", "b": "B", "c": "B", "z": holding(100)}, asked)
    assert (final.expert, rounds) == ("b", [["a", "b", "c"], ["z"]])
    assert final.notes[0].startswith("z could not aggregate: ContextLengthExceeded: the prompt has ")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 2000), min_size=3, max_size=3),
    letters=st.integers(1, 12),
    context=st.integers(40, 2000),
)
def test_cutting_ends_soon_and_never_shows_more_than_fits(lengths: list[int], letters: int, context: int) -> None:
    texts = [("x" * letters + " ") * (length // (letters + 1) + 1) for length in lengths]
    says = {**dict(zip("abc", texts, strict=True)), "z": holding(context)}
    final, rounds = run(Aggregate("z"), THREE, says)
    assert len(rounds) <= 5
    assert final.expert == "z" or "could not aggregate" in final.notes[-1]
    if final.expert == "z":
        assert len(final.text.split()) < context and (len(rounds) == 2) == (not final.notes)


def test_an_answer_that_the_context_ended_says_so() -> None:
    ended = Answer("z", "it is", "length", Usage(500, 2), 1.0)
    assert run(Aggregate("z"), THREE, {"a": "1", "b": "2", "c": "3", "z": ended})[0].notes == (
        "the context of z ended its answer after 2 tokens",
    )
    asked = replace(REQUEST, max_tokens=2)
    assert run(Aggregate("z"), THREE, {"a": "1", "b": "2", "c": "3", "z": ended}, asked)[0].notes == ()


def test_an_aggregator_that_the_caller_does_not_allow_is_not_asked() -> None:
    barred = without(Aggregate("z"), {"z": "allowed experts: the caller does not allow it", "y": "gone"})
    assert isinstance(barred, Without)
    final, rounds = run(barred, THREE, {"a": "C", "b": "B", "c": "B"})
    assert (final.expert, rounds) == ("b", [["a", "b", "c"]])
    assert final.notes == (
        "z could not aggregate: NotAllowed: 'z' cannot take this request: "
        "allowed experts: the caller does not allow it; the answer is the majority of the experts",
    )
    assert without(Aggregate("z"), {"y": "gone"}) == Aggregate("z")
    chain = without(build_composition("chain", {"experts": ["y", "a"]}), {"y": "gone"})
    assert run(chain, THREE, {"a": "4"})[1] == [["a"]]
    with pytest.raises(NotAllowed, match="gone"):
        run(without(build_composition("chain", {"experts": ["y", "y"]}), {"y": "gone"}), THREE, {})


def test_the_same_arguments_give_the_same_step_in_whatever_order_they_came() -> None:
    done = {"0.0": answer("a", "A", 0.1), "0.1": answer("b", "B", 0.2), "0.2": answer("c", "C", 0.3)}
    backwards = dict(reversed({**done, "1.aggregator": answer("z", "B", 0.4)}.items()))
    one = Aggregate("z").step(REQUEST, THREE, {**done, "1.aggregator": answer("z", "B", 0.4)})
    assert isinstance(one, Final) and one == Aggregate("z").step(REQUEST, THREE, backwards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "composition 'aggregate' needs the setting aggregator"),
        ({"aggregator": ""}, "aggregator must be the name of an expert"),
        ({"aggregator": ["z"]}, "aggregator must be the name of an expert"),
        ({"aggregator": {"maths": "z"}}, "needs `default`, for all other labels; it has: maths"),
        ({"aggregator": {"default": 3}}, "aggregator of 'default' must be the name"),
        ({"aggregator": "z", "template": "{question}"}, "must contain {answers} exactly once"),
        ({"aggregator": "z", "template": 3}, "the template must be a text"),
        ({"aggregator": "z", "expert_deadline_s": 0}, "expert_deadline_s must be a number of seconds above 0"),
        ({"aggregator": "z", "max_answer_tokens": 0}, "max_answer_tokens must be a whole number of at least 1"),
        ({"aggregator": "z", "deadline_s": 1}, "has no setting deadline_s; it has: aggregator, template"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_composition("aggregate", settings)


def test_the_template_is_the_shared_one() -> None:
    assert Aggregate("z").template == TEMPLATE
