"""Compositions of several experts through the API: the named expert, the cost, and streaming."""

from __future__ import annotations

from typing import Any

import pytest
from api_server import Gateway, gateway

from coe.compose import Cascade, Composition, Vote
from coe.orchestrator import Orchestrator
from coe.policy import Policy
from routers.selectors import TopK

QUESTION: list[Any] = [{"role": "user", "content": "hello upper world"}]
"""`upper` is the best at it; it answers in capitals, which count as the same."""


def offer(g: Gateway, composition: Composition, k: int) -> None:
    """A policy `several` of that composition."""
    now = g.service.orchestrator
    several = Policy("several", now.policies["default"].router, composition=composition, select=TopK(k))
    g.service.update(Orchestrator(now.snapshot, {**now.policies, "several": several}, ask=g.host.ask))


async def ask(g: Gateway, **options: Any) -> tuple[dict[str, str], Any]:
    raw = await g.client.chat.completions.with_raw_response.create(
        model="coe/several", messages=QUESTION, extra_headers={"x-coe-debug": "true"}, **options
    )
    return dict(raw.headers), raw.parse()


async def test_a_vote_names_the_expert_whose_answer_is_returned_and_bills_all_that_were_asked() -> None:
    async with gateway() as g:
        offer(g, Vote(), k=2)
        headers, answer = await ask(g)
        assert answer.choices[0].message.content == "HELLO UPPER WORLD"
        assert headers["x-coe-expert"] == answer.model == "upper" and headers["x-coe-router"] == "several"
        told = answer.model_extra["coe"]
        assert told["asked"] == ["upper", "echo"] and set(told["decision"]["experts"]) == {"upper", "echo"}
        assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 6)
        [line] = await g.log.ended(1)
        assert line.expert == "upper" and line.answer is not None and line.answer.usage.prompt_tokens == 6
        assert line.gateway_s is not None and line.answer.timing is not None


async def test_a_streamed_vote_comes_as_one_piece_when_the_last_vote_is_cast() -> None:
    async with gateway() as g:
        offer(g, Vote(), k=2)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await g.client.chat.completions.create(model="coe/several", messages=QUESTION, **options)  # type: ignore[call-overload]
        chunks = [chunk async for chunk in stream]
        pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        assert pieces == ["HELLO UPPER WORLD"] and {chunk.model for chunk in chunks} == {"upper"}
        assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [12]


async def test_a_cascade_that_is_sure_of_its_first_expert_streams_it() -> None:
    async with gateway(token_delay_s=0.01) as g:
        offer(g, Cascade(confidence=0.9), k=3)
        stream = await g.client.chat.completions.create(model="coe/several", messages=QUESTION, stream=True)
        pieces = [c.choices[0].delta.content async for c in stream if c.choices and c.choices[0].delta.content]
        assert len(pieces) == 3 and "".join(pieces) == "HELLO UPPER WORLD"
        [line] = await g.log.ended(1)
        assert line.first_s is not None and line.first_s < line.total_s and line.answer is not None
        assert line.answer.usage.prompt_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_the_rest_of_a_vote_answers_where_an_expert_fails(stream: bool) -> None:
    async with gateway() as g:
        offer(g, Vote(), k=9)  # `unloadable` and `failing` are among them
        if stream:
            chunks = await g.client.chat.completions.create(model="coe/several", messages=QUESTION, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])
        else:
            headers, answer = await ask(g)
            text = answer.choices[0].message.content
            assert "unloadable" in answer.model_extra["coe"]["asked"] and headers["x-coe-expert"] == "upper"
        assert text == "HELLO UPPER WORLD"
