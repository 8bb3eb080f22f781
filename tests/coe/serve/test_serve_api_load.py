"""The API under load: many clients, disconnects, rejected requests, and changes of the configuration."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from api_server import EXPERTS, Gateway, expert, gateway, orchestrator_over

HEAD = b"host: localhost\r\ncontent-type: application/json\r\n"


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def text_of(g: Gateway, model: str, text: str, stream: bool) -> tuple[str, str]:
    """The expert and its answer."""
    if not stream:
        answer = await g.client.chat.completions.create(model=model, messages=said(text))
        return answer.model, answer.choices[0].message.content or ""
    chunks = [c async for c in await g.client.chat.completions.create(model=model, messages=said(text), stream=True)]
    return chunks[0].model, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def idle(g: Gateway) -> None:
    """Wait until no request is running."""
    async with asyncio.timeout(5):
        while g.host.busy or g.service.in_flight:  # there is no event for idleness  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_sixteen_clients_of_mixed_experts_each_get_their_own_right_answer() -> None:
    async with gateway(token_delay_s=0.001) as g:

        async def client(i: int) -> None:
            for turn in range(4):
                model, name = [("auto", "upper"), ("echo", "echo"), ("upper", "upper"), ("coe/safe", "echo")][
                    (i + turn) % 4
                ]
                text = f"client {i} turn {turn} asks {name}"
                expected = text.upper() if name == "upper" else text
                assert await text_of(g, model, text, stream=i % 2 == 0) == (name, expected)

        await asyncio.gather(*(client(i) for i in range(16)))
        lines = await g.log.ended(64)
        assert {line.error for line in lines} == {None} and len({line.id for line in lines}) == 64
        assert not g.engine.tally.cancelled.total()


async def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_the_expert() -> None:
    async with gateway(token_delay_s=0.01) as g:
        stream = await g.client.chat.completions.create(model="echo", messages=said("a " * 500), stream=True)
        await anext(stream)
        await stream.close()
        [line] = await g.log.ended(1)
        assert (line.error, line.status, line.expert, line.answer) == ("cancelled", 200, "echo", None)
        assert line.total_s < 4
        await idle(g)
        assert g.engine.tally.cancelled["echo"] == 1


async def test_a_client_that_leaves_before_the_first_text_frees_the_expert_too() -> None:
    async with gateway(token_delay_s=30) as g:
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                await g.client.chat.completions.create(model="echo", messages=said("a"), stream=stream, timeout=0.5)
        lines = await g.log.ended(2)
        assert [(line.error, line.status, line.first_s) for line in lines] == [("cancelled", 499, None)] * 2
        await idle(g)
        assert g.engine.tally.cancelled["echo"] == 2


async def test_a_client_that_leaves_before_its_body_is_whole_is_noted() -> None:
    async with gateway() as g:
        _, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"content-length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        [line] = await g.log.ended(1)
        assert (line.error, line.status, line.model) == ("cancelled", 499, "")


async def test_too_many_requests_are_told_when_to_come_back() -> None:
    async with gateway(token_delay_s=30, settings={"max_in_flight": 2}) as g:
        waiting = [asyncio.create_task(text_of(g, "echo", "a", stream=True)) for _ in range(2)]
        async with asyncio.timeout(5):
            while g.service.in_flight < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        with pytest.raises(openai.RateLimitError, match=r"2 requests are in flight already") as caught:
            await g.client.chat.completions.create(model="echo", messages=said("b"))
        assert caught.value.response.headers["retry-after"] == "1"
        assert (caught.value.code, caught.value.type) == ("overloaded", "rate_limit_error")
        assert (await g.http.get("/health")).json()["in_flight"] == 2, "health is always answered"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await idle(g)


async def test_a_deadline_covers_everything_and_frees_the_expert() -> None:
    async with gateway(token_delay_s=0.02, settings={"deadline_s": 20}) as g:
        text = "a " * 500
        for stream, name in ((False, "echo"), (True, "echo")):
            body = {"model": name, "messages": said(text), "stream": stream, "coe": {"deadline_s": 0.6}}
            response = await g.http.post("/v1/chat/completions", json=body)
            if stream:
                last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
                assert response.status_code == 200
            else:
                last = response.json()
                assert response.status_code == 504
            assert last["error"]["code"] == "deadline_exceeded"
            assert last["error"]["message"] == "the request did not finish within 0.6 s"
        await idle(g)
        assert g.engine.tally.cancelled["echo"] == 2
        assert [line.error for line in g.log.lines] == ["deadline_exceeded"] * 2
        assert all(line.total_s < 5 for line in g.log.lines)


async def test_a_slow_body_meets_the_deadline_of_the_service() -> None:
    async with gateway(settings={"deadline_s": 0.1}) as g:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"content-length: 100\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 504")
        writer.close()
        await writer.wait_closed()


async def test_a_request_under_way_ends_on_what_it_began_with() -> None:
    async with gateway(token_delay_s=0.02) as g:
        stream = await g.client.chat.completions.create(model="upper", messages=said("one two three"), stream=True)
        await anext(stream)
        without = [spec for spec in EXPERTS if spec.name != "upper"] + [expert("new", "fake://upper")]
        g.service.update(orchestrator_over(g.host, without, version=8))
        with pytest.raises(openai.NotFoundError):
            await g.client.chat.completions.create(model="upper", messages=said("hi"))
        assert "new" in [model.id async for model in g.client.models.list()]
        rest = [chunk.choices[0].delta.content async for chunk in stream]
        assert rest == ["ONE", " TWO", " THREE", None]
        refused, answered = sorted(await g.log.ended(2), key=lambda line: line.status, reverse=True)
        assert (answered.registry_version, refused.registry_version) == (7, 8)
        assert (await g.http.get("/health")).json()["registry_version"] == 8
