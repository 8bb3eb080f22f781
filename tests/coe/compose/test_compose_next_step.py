"""A composition of another package that breaks the contract of `step` gets one error that names its class."""

from __future__ import annotations

from typing import Any

import pytest

from coe.compose import FALLBACK, ExpertCall, ExpertCalls, Final, WithFallback, Without, next_step
from coe.errors import Abstained, CoeError, CompositionError, EngineError
from coe.types import Answer, Failure, GenerateRequest, Usage
from routers.base import Message, RoutingDecision

REQUEST = GenerateRequest(messages=(Message("user", "hello"),))
DECISION = RoutingDecision(("a",), (1.0,), (0.5,), confidence=1.0)
ANSWER = Answer("a", "hi", "stop", Usage(1, 1))
CALL = ExpertCall("0", "a", REQUEST)


class Returns:
    """Returns or raises what it is given."""

    def __init__(self, step: Any) -> None:
        self.returned = step

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Any) -> Any:
        if isinstance(self.returned, BaseException):
            raise self.returned
        return self.returned


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (None, "must return ExpertCalls or Final, not NoneType"),
        ("text", "must return ExpertCalls or Final, not str"),
        (Final("text"), "must return ExpertCalls or Final, not Final"),  # type: ignore[arg-type]
        (ExpertCalls(("a",)), "must return ExpertCalls or Final"),  # type: ignore[arg-type]
        (ExpertCalls(()), "at least one call"),
        (ExpertCalls((ExpertCall("done", "a", REQUEST),)), "none that is done already"),
        (ExpertCalls((CALL, ExpertCall("1", "a", REQUEST)), last=True), "one call with `last`, not 2"),
        (ZeroDivisionError("by zero"), "raised ZeroDivisionError: by zero"),
    ],
)
def test_a_broken_step_names_the_class(step: Any, message: str) -> None:
    with pytest.raises(CompositionError, match=rf"composition .*\.Returns: `step` .*{message}") as caught:
        next_step(Returns(step), REQUEST, DECISION, {"done": ANSWER})
    assert caught.value.client_text == "the composition of the policy failed"


@pytest.mark.parametrize("step", [None, "text", ZeroDivisionError("secret"), SystemExit(1), StopIteration()])
def test_a_broken_composition_is_answered_by_the_fallback_with_a_note(step: Any) -> None:
    composition = WithFallback(Returns(step), "b")
    asked = next_step(composition, REQUEST, DECISION, {})
    assert isinstance(asked, ExpertCalls) and [call.expert for call in asked.calls] == ["b"] and asked.last
    final = next_step(composition, REQUEST, DECISION, {FALLBACK: ANSWER})
    assert isinstance(final, Final)
    assert final.answer.notes == asked.notes == ("the composition of the policy failed",)
    with pytest.raises(EngineError, match="down"):
        next_step(composition, REQUEST, DECISION, {FALLBACK: Failure("b", EngineError("down"))})


def test_a_barred_expert_does_not_hide_the_name() -> None:
    with pytest.raises(CoeError, match=r"composition .*\.Returns: `step` must return"):
        next_step(Without(Returns(None), {"b": "why"}), REQUEST, DECISION, {})


def test_what_keeps_the_contract_passes() -> None:
    for step in (Final(ANSWER), ExpertCalls((CALL,), last=True)):
        assert next_step(Returns(step), REQUEST, DECISION, {}) is step
    with pytest.raises(Abstained):
        next_step(Returns(Abstained("no")), REQUEST, DECISION, {})
