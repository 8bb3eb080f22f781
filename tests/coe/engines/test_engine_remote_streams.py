"""Answers of endpoints that are not as OpenAI sends them: tolerated where harmless, else one error of the expert."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_endpoint import DONE, OK, Behaviour, Send, answering, event, raw_endpoint

from coe.chunks import Joined
from coe.engines.remote.answer import EndpointAnswer, EndpointFailure, OnlyReasoning, StreamCut
from coe.engines.remote.calls import MOST_CALLS
from coe.engines.remote.engine import RemoteEngine
from coe.engines.remote.events import COMPLETE, MalformedStream, read_events
from coe.engines.remote.limits import MOST_LINE_BYTES, MOST_STREAM_BYTES, Limits
from coe.errors import CoeError, Rejected, RemoteError, Scope
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec
from routers.base import Message

HELLO = GenerateRequest(messages=(Message("user", "Hello"),), max_tokens=20)
LIMITS = Limits.of(20, silence_s=60)


async def ask(spec: ExpertSpec, request: GenerateRequest = HELLO, **options: Any) -> list[Chunk]:
    engine = RemoteEngine(**{"retries": 0, "backoff_s": 0.01, "timeout_s": 5.0, **options})
    expert = await engine.load(spec, Path())
    try:
        return [chunk async for chunk in expert.generate(request)]
    finally:
        await engine.unload(expert)


async def answer(behave: Behaviour, **options: Any) -> tuple[str, Chunk]:
    async with raw_endpoint(behave) as endpoint:
        chunks = await ask(endpoint.spec(), **options)
        return "".join(chunk.text for chunk in chunks), chunks[-1]


HI = event("Hi ") + event("you")
END = event(None, "stop")
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'


@pytest.mark.parametrize(
    "body",
    [
        HI + END + USAGE + DONE,
        HI + END + USAGE,
        HI + USAGE + DONE,  # no finish reason, but an end
        'data: {"choices": null}\n\n' + HI + 'data: {"choices": []}\n\n' + END + USAGE + DONE,
        'data: {"choices": [{"delta": null}]}\n\ndata: {"choices": [{}]}\n\ndata: {}\n\n' + HI + END + USAGE,
        ": comment\nevent: message\nid: 3\nretry: 10\n" + HI + ": ping\n\n" + END + USAGE + "data:\n\n" + DONE,
        (HI + END + USAGE + DONE).replace("\n", "\r\n"),
        (HI + END + USAGE + DONE).replace("\n", "\r"),
        (HI + END + USAGE + DONE).replace("\n\n", "\n"),
        (HI + END + USAGE + DONE).replace("data: ", "data:"),
        "\ufeff" + HI + END + USAGE,
        HI + END + USAGE + 'data: {"error": {"message": "too late"}}\n\n',
        HI + END + USAGE + "data: {not json\n\n",
        HI + 'data: {"choices": [{"delta": {},\ndata:  "finish_reason": "stop"}]}\n\n' + USAGE,
        HI + event(None, "null") + event(None, "") + END + USAGE,
        'data: {"error": null, "choices": [{"delta": {"content": [{"type": "text", "text": "Hi "}]}}]}\n\n'
        + event("you", "stop")
        + USAGE.strip(),
        'data: {"choices": [{"text": "Hi you", "finish_reason": "stop"}]}\n\n' + USAGE,
        json.dumps(
            {
                "choices": [{"message": {"role": "assistant", "content": "Hi you"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 2.0},
            },
            indent=2,
        ),
    ],
)
async def test_harmless_differences_are_tolerated(body: str) -> None:
    text, last = await answer(answering(body))
    assert (text, last.finish_reason, last.usage) == ("Hi you", "stop", Usage(7, 2))
    assert last.usage is not None and not last.usage.estimated


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "text/html; charset=x", ""])
async def test_the_content_type_does_not_matter(kind: str) -> None:
    assert (await answer(answering(HI + END, f"HTTP/1.1 200 OK\r\ncontent-type: {kind}")))[0] == "Hi you"


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("eos", "stop"),
        ("eos_token", "stop"),
        ("end_turn", "stop"),
        ("tool_calls", "stop"),
        ("no such reason", "stop"),
        (7, "stop"),
        ("max_tokens", "length"),
        ("length", "length"),
    ],
)
async def test_finish_reasons_of_other_servers(stated: Any, reason: str) -> None:
    assert (await answer(answering(HI + event(None, stated))))[1].finish_reason == reason


@pytest.mark.parametrize("stated", ["tool_calls", "function_call"])
async def test_a_tool_call_without_text_is_no_answer(stated: str) -> None:
    with pytest.raises(RemoteError, match="calls a tool"):
        await answer(answering(event(None, stated) + DONE))


REASONING = [
    {"reasoning_content": "Hm, let me see"},
    {"content": "", "reasoning": "Hm"},
    {"content": None, "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]},
]


def parts(delta: dict[str, Any], reason: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"


@pytest.mark.parametrize("delta", REASONING)
async def test_an_answer_of_reasoning_alone_is_a_failure_of_the_expert(delta: dict[str, Any]) -> None:
    with pytest.raises(RemoteError, match="has reasoning, but no text") as failed:
        await answer(answering(parts(delta) * 2 + END + USAGE + DONE))
    assert failed.value.scope is Scope.EXPERT and not failed.value.retryable
    whole = {"choices": [{"message": {"role": "assistant", **delta}, "finish_reason": "stop"}]}
    with pytest.raises(RemoteError, match="has reasoning, but no text"):
        await answer(answering(json.dumps(whole)))


@pytest.mark.parametrize("delta", REASONING)
async def test_max_tokens_spent_on_reasoning_is_a_rejection_that_says_so(delta: dict[str, Any]) -> None:
    with pytest.raises(Rejected, match="spent max_tokens on reasoning and gave no answer: raise max_tokens") as failed:
        await answer(answering(parts(delta) + event(None, "length") + DONE))
    assert (failed.value.scope, failed.value.status) == (Scope.EXPERT, 400)
    assert "127.0.0.1" not in (failed.value.client_text or "")


@pytest.mark.parametrize("delta", REASONING)
async def test_reasoning_before_text_changes_nothing(delta: dict[str, Any]) -> None:
    assert (await answer(answering(parts(delta) + HI + END + USAGE)))[0] == "Hi you"
    assert (await answer(answering(parts(delta) + HI + event(None, "length"))))[1].finish_reason == "length"


async def test_a_part_whose_type_is_no_text_is_a_part_of_the_answer() -> None:
    odd = parts({"content": [{"type": [], "text": "Hi"}, {"type": {"a": 1}, "text": " you"}]})
    assert (await answer(answering(odd + END + USAGE)))[0] == "Hi you"


async def test_an_empty_answer_without_reasoning_is_one() -> None:
    nothing = parts({"reasoning_content": "", "reasoning": None}) + END + DONE
    text, last = await answer(answering(nothing))
    assert (text, last.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("usage", "expected", "estimated"),
    [
        (None, (6, 3), True),
        ({"prompt_tokens": None, "completion_tokens": None}, (6, 3), True),
        ({"prompt_tokens": 7}, (7, 3), True),
        ({"prompt_tokens": "7", "completion_tokens": -1}, (6, 3), True),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (6, 3), True),
        ({"prompt_tokens": True, "completion_tokens": 1e300}, (6, 3), True),
        ([], (6, 3), True),
        ({"prompt_tokens": 7.0, "completion_tokens": 3, "total_tokens": None}, (7, 3), False),
    ],
)
async def test_usage_that_is_missing_or_impossible_is_estimated_and_marked(
    usage: Any, expected: tuple[int, int], estimated: bool
) -> None:
    body = HI + event(None, "stop", usage=usage) if usage is not None else HI + END
    _, last = await answer(answering(body + DONE))
    assert last.usage == Usage(*expected) and last.usage.estimated is estimated


async def test_estimates_know_scripts_and_never_exceed_max_tokens() -> None:
    _, last = await answer(answering(event("答案是巴黎。", "stop")))
    assert last.usage is not None and 5 <= last.usage.completion_tokens <= 7
    _, last = await answer(answering(event("one two three " * 50, "stop")))
    assert last.usage is not None and last.usage.completion_tokens == HELLO.max_tokens


async def test_surrogate_pairs_over_two_events_are_joined_and_halves_replaced() -> None:
    halves = 'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}\n\n'
    other = 'data: {"choices": [{"delta": {"content": "\\ude00b"}}]}\n\n'
    assert (await answer(answering(halves + other + END)))[0] == "a😀b"
    assert (await answer(answering(halves + END)))[0] == "a\ufffd"
    assert (await answer(answering(other + END)))[0] == "\ufffdb"
    assert (await answer(answering(b'data: {"choices": [{"delta": {"content": "\xff\xe9"}}]}\n\n' + END.encode())))[
        0
    ] == "\ufffd\ufffd"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("", "closed the stream before its end"),
        ("nothing\n\n", "closed the stream before its end"),
        (": ping\n\n" * 3, "closed the stream before its end"),
        ("<!DOCTYPE html><html>Log in</html>", "it is a page instead of an answer"),
        ("data: [1, 2]\n\n", "not a JSON object but a list"),
        ("data: 7\n\n", "not a JSON object but a int"),
        ("data: {broken\n\n", "not valid JSON"),
        ("{broken", "not valid JSON"),
        ("data: " + "[" * 100_000 + "\n\n", r"an event is not valid JSON \(RecursionError\)"),
        ('data: {"choices": ' + "9" * 5000 + "}\n\n", "not valid JSON"),
        ('data: {"choices": {"0": 1}}\n\n', "`choices` of an event is not a list"),
        ('data: {"choices": ["x"]}\n\n', "`choices` of an event is not a list"),
        ('data: {"choices": [{"delta": "x"}]}\n\n', "`delta` of a choice is not an object"),
        ('data: {"choices": [{"delta": {"content": 7}}]}\n\n', "the text of a choice is a int"),
        ('data: {"error": {"message": "it crashed"}}\n\n', "APIError: it crashed"),
        ('data: {"error": "it crashed"}\n\n', "APIError: it crashed"),
        ('{"error": {"message": "it crashed", "type": "server_error"}}', "APIError: it crashed"),
        (event(None, "content_filter"), "ended with finish_reason 'content_filter'"),
        (event(None, "error"), "ended with finish_reason 'error'"),
    ],
)
async def test_what_is_no_answer_is_an_error_of_the_endpoint(body: str, match: str) -> None:
    with pytest.raises(RemoteError, match=match) as caught:
        await answer(answering(body))
    assert caught.value.scope is Scope.EXPERT and caught.value.status == 502
    assert "127.0.0.1" not in (caught.value.client_text or "127.0.0.1")


async def test_an_error_inside_an_answer_has_the_meaning_of_its_status() -> None:
    with pytest.raises(RemoteError, match="no more") as limited:
        await answer(answering('data: {"error": {"message": "no more", "code": 429}}\n\n'))
    assert (limited.value.status, limited.value.retryable) == (429, True)
    with pytest.raises(Rejected, match="too long") as rejected:
        await answer(answering('{"error": {"message": "too long", "status": 400, "code": "context_length_exceeded"}}'))
    assert (rejected.value.status, rejected.value.code) == (400, "context_length_exceeded")


def flood(first: bytes, piece: bytes, total: int = 10**9) -> Behaviour:
    async def behave(send: Send) -> None:
        await send(f"{OK}\r\nconnection: close\r\n\r\n".encode() + first)
        for _ in range(total // len(piece)):
            await send(piece)

    return behave


@pytest.mark.parametrize(
    ("first", "piece", "match"),
    [
        (b"data: ", b"x" * 2**16, "a line exceeds 282,624 bytes"),
        (b'{"choices": [{"message": {"content": "', b"x" * 2**16, "a line exceeds"),
        (b"{\n", b"x" * 1000 + b"\n", "an event is longer"),
        (b"data: {\n", b"data: " + b"x" * 1000 + b"\n", "an event is longer"),
        (b"", b": ping\n\n" * 1000, "it exceeds 1,130,496 bytes"),
        (b"", b'data: {"choices": []}\n\n' * 1000, "it exceeds 1,130,496 bytes"),
    ],
    ids=["line", "json", "json lines", "data lines", "comments", "empty events"],
)
async def test_a_body_of_a_gigabyte_is_given_up_and_not_kept(first: bytes, piece: bytes, match: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteError, match=match):
            await answer(flood(first, piece))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


async def test_a_text_longer_than_max_tokens_can_give_is_cut() -> None:
    text, last = await answer(flood(b"", event("word " * 20).encode() * 10))
    assert len(text) == LIMITS.characters == 1000 + 20 * 128
    assert last.finish_reason == "length" and last.usage is not None and last.usage.estimated


async def test_error_bodies_of_a_gigabyte_are_read_only_in_part() -> None:
    head = "HTTP/1.1 500 Oops\r\ncontent-type: text/html"

    async def behave(send: Send) -> None:
        await send(f"{head}\r\nconnection: close\r\n\r\n".encode())
        for _ in range(20_000):
            await send(b"<p>" + b"x" * 50_000)

    tracemalloc.start()
    try:
        with pytest.raises(RemoteError, match="HTTP status 500") as caught:
            await answer(behave)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2500
    assert caught.value.client_text == "the endpoint of 'far' returned HTTP status 500"


async def test_a_compressed_answer_is_refused_and_none_is_asked_for() -> None:
    async with raw_endpoint(answering(b"\x1f\x8b" + b"0" * 100, OK + "\r\ncontent-encoding: gzip")) as endpoint:
        with pytest.raises(RemoteError, match="it is compressed"):
            await ask(endpoint.spec())
        assert "accept-encoding: identity" in endpoint.requests[0][0].lower()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    async with raw_endpoint(answering(HI + END)) as other:
        head = f"HTTP/1.1 {status} Moved\r\nlocation: http://127.0.0.1:{other.port}/v1/chat/completions?key=secret"
        async with raw_endpoint(answering("", head)) as endpoint:
            with pytest.raises(RemoteError, match="redirects to http://127.0.0.1/v1/.*which is not followed") as caught:
                await ask(endpoint.spec())
        assert other.requests == [] and "secret" not in str(caught.value)
        assert caught.value.client_text == "the endpoint of 'far' redirects elsewhere"


async def test_silence_ends_even_if_comments_come() -> None:
    async def pings(send: Send) -> None:
        await send(f"{OK}\r\n\r\n".encode())
        while True:
            await send(b": ping\n\n")
            await asyncio.sleep(0.01)

    with pytest.raises(RemoteError, match=r"no event came within 0\.5 s"):
        await answer(pings, timeout_s=0.05)


async def test_an_answer_is_whole_without_waiting_for_the_connection_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.remote.answer._TAIL_S", 0.05)

    async def lingers(send: Send) -> None:
        await send(f"{OK}\r\n\r\n{HI}{END}".encode())
        await asyncio.sleep(60)

    began = time.monotonic()
    assert (await answer(lingers))[0] == "Hi you"
    assert time.monotonic() - began < 4


async def test_the_deadline_ends_retries() -> None:
    async def silent(send: Send) -> None:
        await asyncio.sleep(60)

    began = time.monotonic()
    with pytest.raises(RemoteError, match="timed out"):
        async with raw_endpoint(silent) as endpoint:
            request = GenerateRequest(messages=HELLO.messages, max_tokens=5, deadline_s=0.3)
            await ask(endpoint.spec(), request, timeout_s=0.2, retries=100)
    assert time.monotonic() - began < 4


async def test_the_deadline_bounds_the_wait_for_bytes() -> None:
    async def silent(send: Send) -> None:
        await asyncio.sleep(60)

    began = time.monotonic()
    async with raw_endpoint(silent) as endpoint:
        with pytest.raises(RemoteError, match="timed out"):
            request = GenerateRequest(messages=HELLO.messages, max_tokens=5, deadline_s=0.2)
            await ask(endpoint.spec(), request, timeout_s=30.0)
    assert time.monotonic() - began < 5


def test_the_limits_follow_max_tokens_up_to_the_hard_ones() -> None:
    small, huge = Limits.of(1, silence_s=1), Limits.of(10**9, silence_s=1)
    assert small.stream_bytes == 2**20 + 4096 and small.line_bytes == 2**18 + 1024
    assert (huge.stream_bytes, huge.line_bytes) == (MOST_STREAM_BYTES, MOST_LINE_BYTES)


@pytest.mark.parametrize("size", [LIMITS.line_bytes, LIMITS.line_bytes + 1])
async def test_a_line_at_the_limit_is_read(size: int) -> None:
    start, end = b'data: {"choices": [{"text": "', b'", "finish_reason": "stop"}]}'
    line = start + b"x" * (size - len(start) - len(end)) + end

    async def pieces() -> Any:
        yield line[:100]
        yield line[100:]
        yield b"\n"

    if size > LIMITS.line_bytes:
        with pytest.raises(MalformedStream, match="a line"):
            [each async for each in read_events(pieces(), LIMITS)]
    else:
        assert len([each async for each in read_events(pieces(), LIMITS)]) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "choices delta content finish_reason usage error message text code tool_calls function_call function "
                "index id name arguments reasoning_content logprobs token logprob bytes top_logprobs tokens "
                "token_logprobs prompt_logprobs decoded_token type thinking".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TEXTS = st.sampled_from(["", "now", "get", "_it", "{", "}", "{}", "a", "\ud83d", None]) | JSON
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 1, 2, -1, None, True, "0"]),
        "id": TEXTS,
        "function": st.none() | st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS}) | JSON,
    },
)
TOKENS = st.fixed_dictionaries(
    {}, optional={"token": TEXTS, "logprob": JSON, "bytes": JSON, "top_logprobs": st.lists(JSON, max_size=3)}
)
SCORES = st.fixed_dictionaries({}, optional={"content": st.lists(TOKENS, max_size=3) | JSON, "tokens": JSON}) | JSON
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "delta": st.fixed_dictionaries(
            {}, optional={"content": TEXTS, "tool_calls": st.lists(CALLS, max_size=3) | JSON, "reasoning_content": JSON}
        ),
        "logprobs": SCORES,
        "finish_reason": st.sampled_from([None, "stop", "tool_calls", "length"]),
    },
)
LINES = st.one_of(
    st.binary(max_size=40),
    JSON.map(lambda value: b"data: " + json.dumps(value).encode()),
    JSON.map(lambda value: json.dumps(value, indent=1).encode()),
    CHOICES.map(lambda value: b"data: " + json.dumps({"choices": [value]}).encode()),
    st.sampled_from([b"", b"data: [DONE]", b": x", b"data:", HI.encode(), END.encode(), USAGE.encode()]),
)
REQUESTS = st.sampled_from(
    [
        HELLO,
        replace(HELLO, tools=({"function": {"name": "now"}}, {"function": {"name": "get_it"}}), logprobs=1),
        GenerateRequest(prompt="now", echo=True, logprobs=0, prompt_logprobs=0, max_tokens=20),
        replace(HELLO, prompt_logprobs=1),
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.lists(LINES, max_size=8), st.integers(1, 50), st.sampled_from([b"\n", b"\n\n", b"\r\n", b"\r"]), REQUESTS)
def test_no_stream_raises_anything_else(lines: list[bytes], size: int, end: bytes, request: GenerateRequest) -> None:
    body = end.join(lines)
    limits = Limits.of_request(request, silence_s=60)

    async def pieces() -> Any:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def read() -> None:
        found = EndpointAnswer(read_events(pieces(), limits), request, limits)
        joined = Joined()
        while (piece := found.take()) is not None:
            joined.add(piece)
            await found.read()
        answer = joined.answer("far", Chunk("", found.reason, found.usage(request)))
        json.dumps(asdict(replace(answer, value=None)), default=repr, ensure_ascii=False, allow_nan=False).encode()
        assert len(answer.text) <= limits.characters and max(map(len, (answer.logprobs, ()))) <= limits.entries
        assert {call.name for call in answer.tool_calls} <= {"now", "get_it"} and len(answer.tool_calls) <= MOST_CALLS
        assert not answer.tool_calls or (request.offered and all(call.id for call in answer.tool_calls))
        assert (answer.finish_reason == "tool_calls") <= bool(answer.tool_calls)
        assert 0 <= answer.usage.prompt_tokens <= 10**9 and 0 <= answer.usage.completion_tokens <= 10**9

    with contextlib.suppress(MalformedStream, EndpointFailure, StreamCut, OnlyReasoning):
        asyncio.run(read())


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_an_event_of_several_lines_may_be_divided_anywhere(end: bytes) -> None:
    lines = [
        b'data: {"choices": [',
        b'data: {"delta": {"content": "Hi \xf0\x9f\x99\x82"}}',
        b"data: ]}",
        b"",
        b"data: [DONE]",
        b"",
    ]
    body = end.join([*lines, b""])

    async def events(*pieces: bytes) -> list[dict[str, Any]]:
        async def sent() -> Any:
            for piece in pieces:
                yield piece

        return [each async for each in read_events(sent(), LIMITS)]

    whole = [{"choices": [{"delta": {"content": "Hi 🙂"}}]}, COMPLETE]
    assert await events(*(body[i : i + 1] for i in range(len(body)))) == whole
    for cut in range(len(body)):
        assert await events(body[:cut], body[cut:]) == whole


async def test_the_end_of_a_body_is_an_event_of_its_own() -> None:
    async def pieces() -> Any:
        yield (HI + DONE + HI).encode()

    events = [each async for each in read_events(pieces(), LIMITS)]
    assert len(events) == 3 and events[-1] is COMPLETE


async def test_every_failure_is_a_coe_error() -> None:
    async with raw_endpoint(answering("not http at all", "garbage")) as endpoint:
        with pytest.raises(CoeError, match="cannot be reached, or closed the connection"):
            await ask(endpoint.spec())
