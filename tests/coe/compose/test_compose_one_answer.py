"""Requests for tool calls or log-probabilities under a policy that combines texts."""

from __future__ import annotations

import pytest

from coe.compose import Composition, ExpertCalls, Final, Single, WithFallback, next_step, without
from coe.compose.aggregate import Aggregate
from coe.compose.one_answer import OneAnswer, as_one_echo
from coe.errors import EngineError
from coe.types import Answer, Failure, GenerateRequest, Usage
from routers.base import Message, RoutingDecision, ToolCall

REQUEST = GenerateRequest((Message("user", "hi"),), tools=({"type": "function"},))
CASCADE = RoutingDecision(("cheap", "best", "cheap"), (0.3, 0.4, 0.3), (0.1, 0.9, 0.1), confidence=0.5)
NOTE = "one expert answers: the composition of the policy combines texts, not tools"


def test_the_best_expert_answers_first_though_a_cascade_starts_with_the_cheapest() -> None:
    step = OneAnswer({"tools"}).step(REQUEST, CASCADE, {})
    assert isinstance(step, ExpertCalls)
    assert [call.expert for call in step.calls] == ["best"]
    assert step.notes == (NOTE,)
    assert step.last


def test_its_answer_is_final_with_its_calls_and_the_note() -> None:
    answer = Answer("best", "", "tool_calls", Usage(1, 1), tool_calls=(ToolCall("c", "f", "{}"),))
    step = OneAnswer({"tools"}).step(REQUEST, CASCADE, {"0": answer})
    assert isinstance(step, Final)
    assert step.answer.tool_calls == answer.tool_calls
    assert step.answer.notes == (NOTE,)


def test_after_a_failure_the_next_best_is_called_once() -> None:
    step = OneAnswer({"tools"}).step(REQUEST, CASCADE, {"0": Failure("best", EngineError("broken"))})
    assert isinstance(step, ExpertCalls)
    assert [call.expert for call in step.calls] == ["cheap"]
    assert step.notes == (NOTE, "best failed: EngineError: broken")


ECHO = GenerateRequest(prompt="The capital is", echo=True)


@pytest.mark.parametrize(
    "composition",
    [
        Aggregate("third"),
        WithFallback(Aggregate("third"), "third"),
        without(Aggregate("third"), {"third": "tools: it cannot call tools"}),
    ],
)
def test_answers_that_begin_with_the_prompt_are_not_combined(composition: Composition) -> None:
    composition = as_one_echo(composition)
    step = next_step(composition, ECHO, CASCADE, {})
    assert isinstance(step, ExpertCalls) and step.last
    assert [(call.expert, call.request) for call in step.calls] == [("best", ECHO)]
    assert step.notes == (NOTE.replace("tools", "echo"),)
    final = next_step(composition, ECHO, CASCADE, {"0": Answer("best", "The capital is Rome", "stop", Usage(1, 1))})
    assert isinstance(final, Final) and final.answer.text == "The capital is Rome"


def test_one_call_with_echo_needs_no_note() -> None:
    one = RoutingDecision(("cheap",), (1.0,), (0.1,), confidence=0.5)
    step = next_step(as_one_echo(Single()), ECHO, one, {})
    assert isinstance(step, ExpertCalls) and not step.notes
