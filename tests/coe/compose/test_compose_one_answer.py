"""Requests for tool calls or log-probabilities under a policy that combines texts."""

from __future__ import annotations

from coe.compose import ExpertCalls, Final
from coe.compose.one_answer import OneAnswer
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
