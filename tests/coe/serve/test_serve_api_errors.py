"""Errors of the API: the official client's exceptions, OpenAI's shape, and streams that break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from api_server import Gateway, gateway

from coe.serve.http.json_body import parse_json

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


async def refused(g: Gateway, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await g.client.chat.completions.create(**{"model": "auto", "messages": HELLO, **options})
    return caught.value


async def posted(
    g: Gateway, content: Any, path: str = "/v1/chat/completions", **options: Any
) -> tuple[int, dict[str, Any]]:
    response = await g.http.post(path, content=content, headers={"content-type": "application/json"}, **options)
    assert "x-coe-decision-id" in response.headers
    return response.status_code, response.json()["error"]


async def test_an_unknown_model_is_not_found_with_close_matches() -> None:
    async with gateway() as g:
        for stream in (False, True):
            error = await refused(g, model="uper", stream=stream)
            assert isinstance(error, openai.NotFoundError) and "did you mean 'upper'" in error.message
            assert (error.code, error.type) == ("model_not_found", "invalid_request_error")
        with pytest.raises(openai.NotFoundError, match="did you mean 'upper'"):
            await g.client.models.retrieve("uper")
        first, _ = await g.log.ended(2)
        assert (first.status, first.error, first.model, first.routed) == (404, "model_not_found", "uper", None)


async def test_wrong_requests_are_bad_requests_that_name_the_field() -> None:
    async with gateway() as g:
        error = await refused(g, audio={"voice": "x"}, user="u")
        assert isinstance(error, openai.BadRequestError)
        assert (error.param, error.code, error.type) == ("audio", "unsupported_parameter", "invalid_request_error")
        error = await refused(g, extra_body={"temprature": 1})
        assert (error.param, error.code) == ("temprature", "unknown_parameter") and "'temperature'" in error.message
        error = await refused(g, extra_body={"coe": {"exclude": ["uper"]}})
        assert error.param == "coe.exclude" and "did you mean 'upper'" in error.message
        error = await refused(g, extra_body={"coe": {"cost_weight": 2}})
        assert (error.param, error.status_code) == ("coe.cost_weight", 400) and "knows no costs" in error.message


async def test_json_is_refused_where_no_expert_promises_it() -> None:
    async with gateway() as g:
        error = await refused(g, response_format={"type": "json_object"})
        assert (error.status_code, error.code) == (
            400,
            "no_eligible_expert",
        ) and "does not promise JSON" in error.message
        error = await refused(g, model="upper", response_format={"type": "json_object"})
        assert error.status_code == 400 and "'upper' cannot take this request" in error.message


async def test_too_long_prompts_say_both_numbers() -> None:
    async with gateway() as g:
        long: list[Any] = [{"role": "user", "content": "word " * 40}]
        error = await refused(g, model="short", messages=long)
        assert isinstance(error, openai.BadRequestError) and error.code == "context_length_exceeded"
        assert "40 tokens" in error.message and "context of 16 tokens" in error.message
        error = await refused(g, messages=long, extra_body={"coe": {"experts": ["short"]}})
        assert error.code == "context_length_exceeded"
        assert "at least 40 tokens do not fit its 16" in error.message
        for model in ("short", "auto"):
            for stream in (False, True):
                only = {} if model == "short" else {"extra_body": {"coe": {"experts": ["short"]}}}
                error = await refused(g, model=model, messages=long, stream=stream, **only)
                assert error.status_code == 400, "a stream has not begun"
                assert error.message.count("This model's maximum context length is exceeded: ") == 1


async def test_a_failing_expert_is_a_server_error_that_keeps_quiet_about_files() -> None:
    async with gateway() as g:
        for stream in (False, True):
            error = await refused(g, model="broken", stream=stream)
            assert isinstance(error, openai.InternalServerError) and error.code == "engine_error"
        error = await refused(g, model="unloadable")
        assert error.code == "invalid_weights" and "fake://" not in error.message
        assert error.response.headers["x-coe-decision-id"] in error.message


async def test_an_unexpected_error_is_logged_under_an_id_and_not_returned(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway() as g:
        error = await refused(g, messages=[{"role": "user", "content": "break the router"}])
        assert (error.status_code, error.code, error.type) == (500, "router_error", "server_error")
        assert "secret" not in error.message
        [record] = caplog.records
        assert "a secret of the router" in caplog.text and record.args is not None
        assert str(record.args[0]) in error.message  # type: ignore[index]
        [line] = await g.log.ended(1)
        assert (line.error, line.status) == ("router_error", 500) and line.id in error.message


async def test_a_stream_that_breaks_ends_with_an_error_event_and_without_done() -> None:
    async with gateway() as g:
        body = {"model": "half", "messages": [{"role": "user", "content": "a b c d"}], "stream": True}
        response = await g.http.post("/v1/chat/completions", json=body)
        events = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-1]]
        assert response.status_code == 200 and "[DONE]" not in response.text
        assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["", "a", " b"]
        assert events[-1]["error"]["code"] == "engine_error" and "after 2 tokens" in events[-1]["error"]["message"]
        seen = []
        stream = await g.client.chat.completions.create(**body)
        with pytest.raises(openai.APIError, match="after 2 tokens"):
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content)  # chunks before the error count  # noqa: PERF401
        assert seen == ["", "a", " b"]
        lines = await g.log.ended(2)
        assert [(line.status, line.error, line.expert, line.answer) for line in lines] == [
            (200, "engine_error", "half", None)
        ] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"model": "auto",\n "messages": [}',
            "the body is not valid JSON: Expecting value: line 2 column 15 (char 32)",
        ),
        (b"", "the body is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"model": "\xff"}', "the body is not UTF-8: invalid start byte at byte 11"),
        (b'{"temperature": NaN}', "NaN is not a number in JSON"),
        (b"[" * 200_000, "the body is nested too deeply"),
        (
            b'{"seed": ' + b"1" * 5000 + b"}",
            "seed: a whole number of 5,000 digits; at most 4,300 are read: shorten it, or put it in quotes as text",
        ),
        (b"[1, 2]", "the body must be a JSON object with the fields of a request, got [1, 2]"),
    ],
    ids=["json", "empty", "utf-8", "nan", "deep", "digits", "array"],
)
async def test_bodies_that_are_no_requests_say_what_is_wrong_and_where(content: bytes, message: str) -> None:
    async with gateway() as g:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/route"):
            status, error = await posted(g, content, path)
            assert status == 400 and message in error["message"] and error["type"] == "invalid_request_error"


def test_a_byte_order_mark_is_no_error() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


async def test_a_body_over_the_limit_is_refused_however_its_length_is_told() -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 500

    async with gateway(settings={"max_body_bytes": 1000}) as g:
        for content in (b" " * 1001, pieces(3), pieces(15)):
            status, error = await posted(g, content)
            assert (status, error["code"]) == (413, "request_too_large") and "1,000 bytes" in error["message"]
        assert (await posted(g, pieces(2)))[0] == 400, "as many as are allowed are read"
        reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        writer.write((b"7d0\r\n" + b" " * 2000 + b"\r\n") * 5)  # followed by more, without end
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.close()
        await writer.wait_closed()


async def test_unknown_paths_and_methods_have_openais_shape_too() -> None:
    async with gateway() as g:
        for path in ("/nowhere", "/v1/chat/completions/", "/v1/moderations"):
            response = await g.http.get(path)
            assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_url"
            assert response.json()["error"]["message"].endswith(
                f"{path}: no such endpoint; GET /docs lists the endpoints"
            )
            assert f"GET {path}" in response.json()["error"]["message"]
        response = await g.http.get("/v1/chat/completions")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert response.json()["error"]["code"] == "method_not_supported"
        assert response.json()["error"]["message"] == "GET /v1/chat/completions: method not allowed; use POST"
        with pytest.raises(openai.NotFoundError):
            await g.client.moderations.create(input="x")


async def test_a_page_that_cannot_be_rendered_is_an_error_in_the_same_shape() -> None:
    class Broken:
        def observe(self, finished: Any) -> None: ...

        async def render(self) -> tuple[bytes, str]:
            raise OSError("a secret of the metrics")

    async with gateway(metrics=Broken()) as g:
        response = await g.http.get("/metrics")
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
