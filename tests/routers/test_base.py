"""The small types: refused values and defaults."""

from __future__ import annotations

import numpy as np
import pytest

from routers.base import Estimate, Message, Query, Router, ToolCall
from routers.decision import Utility
from routers.errors import RouterError
from routers.factory import TrainableRouter
from routers.kinds.baselines import BestSingleRouter


def test_the_text_of_a_query_is_its_last_user_message():
    turns = (
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "2+2"),
    )
    assert Query(messages=(*turns, Message("assistant", "4"))).text == "2+2"
    assert Query(messages=(Message("system", "be brief"),)).text == ""
    assert Query.of("hi", id="q1").messages == (Message("user", "hi"),)


def test_an_estimate_checks_its_shapes():
    quality = np.zeros((2, 2))
    assert len(Estimate(("a", "b"), quality)) == 2
    with pytest.raises(RouterError, match="2 columns for 1 experts"):
        Estimate(("a",), quality)
    with pytest.raises(RouterError, match=r"cost_usd has shape \(1, 2\), expected \(2, 2\)"):
        Estimate(("a", "b"), quality, cost_usd=np.zeros((1, 2)))
    with pytest.raises(RouterError, match="labels has 1 entries for 2 queries"):
        Estimate(("a", "b"), quality, labels=("x",))


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["cost_weight", "latency_weight"])
def test_rates_are_finite_and_not_negative(name, value):
    with pytest.raises(RouterError, match=f"{name} must be a finite number >= 0"):
        Utility(**{name: value})


def test_a_router_is_recognised_by_its_methods():
    assert isinstance(BestSingleRouter(), Router)
    assert isinstance(BestSingleRouter(), TrainableRouter)
    assert not isinstance(object(), Router)


def test_a_message_is_the_same_after_its_openai_form():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        Message("user", "hi"),
        Message("user", "what is it?", parts=({"type": "text", "text": "what is it?"}, image)),
        Message("assistant", "", (ToolCall("call_1", "look", '{"at": 1}'),), reasoning="I should look."),
        Message("tool", "a cat", tool_call_id="call_1", name="look"),
    ]
    assert [Message.of(message.document()) for message in messages] == messages
    assert messages[0].document() == {"role": "user", "content": "hi"}, "nothing that is not set"
    assert messages[2].document()["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    ]
