"""Bounds of the API on a real socket: slow, lying and endless bodies, large headers, deep and wide JSON."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import pytest
from api_server import connected, gateway
from hypothesis import given, settings
from hypothesis import strategies as st

from coe.errors import InvalidRequest
from coe.serve.http import json_body
from coe.serve.http.guard import MOST_HEADER_BYTES
from coe.serve.http.json_body import (
    MOST_LEVELS,
    MOST_LITERAL_BYTES,
    MOST_VALUES,
    STEP_BYTES,
    parse_json,
    parsing,
)
from coe.serve.http.large_bodies import REFUSED_S

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
ASK: dict[str, Any] = {"model": "echo", "prompt": "a b"}
BODY = json.dumps(ASK).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON body of the next answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
    status, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(status.split()[1]), headers, json.loads(body) if body else None


async def test_slow_bodies_take_no_place_and_everybody_else_is_answered() -> None:
    async with gateway(settings={"max_in_flight": 4, "body_idle_s": 0.5}) as g:
        slow = [await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2])) for _ in range(8)]
        for _, writer in slow:
            writer.write(HEAD + b"content-length: 1000\r\n\r\n" + b'{"model"')
        async with asyncio.timeout(5):
            while len(g.service.uploads) < 8:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert g.service.in_flight == 0 and (await g.http.get("/health")).json()["in_flight"] == 0
        for _ in range(5):
            assert (await g.http.post("/v1/completions", json=ASK)).status_code == 200
        for reader, writer in slow:
            status, headers, body = await answer(reader)
            assert (status, body["error"]["code"]) == (408, "request_timeout")
            assert "0.5 s without a byte (serve.body_idle_s)" in body["error"]["message"]
            assert headers["connection"] == "close" and await reader.read() == b""
            writer.close()
        assert len(g.service.uploads) == 0
        lines = await g.log.ended(13)
        assert sorted(line.status for line in lines) == [200] * 5 + [408] * 8


async def test_a_body_that_never_pauses_is_bounded_in_all() -> None:
    async with gateway(settings={"body_timeout_s": 0.5, "body_idle_s": 10}) as g, connected(g.port) as (reader, writer):
        writer.write(HEAD + b"content-length: 1000\r\n\r\n")

        async def dribble() -> None:
            while not writer.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        status, _, body = await answer(reader)
        dribbling.cancel()
        assert status == 408 and "at most 0.5 s in all (serve.body_timeout_s)" in body["error"]["message"]


async def test_a_body_that_pauses_less_than_the_limit_is_read() -> None:
    async with gateway(settings={"body_idle_s": 1.0}) as g, connected(g.port) as (reader, writer):
        writer.write(HEAD + f"content-length: {len(BODY)}\r\n\r\n".encode())
        for byte in BODY:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.005)
        status, _, body = await answer(reader)
        assert status == 200 and body["choices"][0]["text"] == "a b"


async def test_the_oldest_upload_makes_room_for_a_new_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.serve.http.uploads.UNDISTURBED_S", 0.0)
    settings = {"max_uploads": 2}
    async with (
        gateway(settings=settings) as g,
        connected(g.port) as (first, writes),
        connected(g.port) as (second, also),
    ):
        for number, writer in enumerate((writes, also)):
            writer.write(HEAD + b"content-length: 1000\r\n\r\n{")
            while len(g.service.uploads) == number:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert (await g.http.post("/v1/completions", json=ASK)).status_code == 200
        status, _, body = await answer(first)
        assert status == 408 and "given up in favour of other requests" in body["error"]["message"]
        assert len(g.service.uploads) == 1, "the younger one is still read"
        also.write(BODY[1:].ljust(999))
        assert (await answer(second))[0] == 200


async def test_uploads_that_all_just_began_are_not_given_up() -> None:
    async with gateway(settings={"max_uploads": 1}) as g, connected(g.port) as (_, writer):
        writer.write(HEAD + b"content-length: 1000\r\n\r\n{")
        async with asyncio.timeout(5):
            while not len(g.service.uploads):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        response = await g.http.post("/v1/completions", json=ASK)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (429, "overloaded") and "serve.max_uploads" in error["message"]
        assert response.headers["retry-after"] == "1"


async def test_unfinished_bodies_hold_a_bounded_number_of_bytes() -> None:
    settings = {"max_body_bytes": 1000, "max_uploads_bytes": 1500}
    async with (
        gateway(settings=settings) as g,
        connected(g.port) as (first, writes),
        connected(g.port) as (second, also),
    ):
        writes.write(HEAD + b"content-length: 1000\r\n\r\n" + b" " * 900)
        while not len(g.service.uploads):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        also.write(HEAD + b"content-length: 1000\r\n\r\n" + b" " * 590)
        await asyncio.sleep(0.05)
        assert len(g.service.uploads) == 2, "as many as are allowed are kept"
        also.write(b" " * 20)
        assert (await answer(first))[0] == 408
        also.write(BODY.ljust(390))
        assert (await answer(second))[0] == 200


async def test_the_declared_length_is_believed_when_it_is_too_large_only() -> None:
    async with gateway(settings={"max_body_bytes": 1000, "body_idle_s": 0.3}) as g:
        for length, status in ((b"1001", 413), (b"9" * 18, 413), (b"500", 408)):
            async with connected(g.port) as (reader, writer):
                writer.write(HEAD + b"content-length: " + length + b"\r\n\r\n" + BODY)
                assert (await answer(reader))[0] == status
        async with connected(g.port) as (reader, writer):  # shorter than what follows: the rest is no request
            writer.write(HEAD + f"content-length: {len(BODY)}\r\n\r\n".encode() + BODY + b"and more\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request")
        assert (await g.http.post("/v1/completions", content=BODY.ljust(1000), headers=JSON)).status_code == 200


JSON = {"content-type": "application/json"}


async def test_continue_is_sent_only_for_a_body_that_will_be_read() -> None:
    async with gateway() as g:
        async with connected(g.port) as (reader, writer):
            writer.write(HEAD + f"content-length: {len(BODY)}\r\nexpect: 100-continue\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
            writer.write(BODY)
            assert (await answer(reader))[0] == 200
        async with connected(g.port) as (reader, writer):
            writer.write(HEAD + b"content-length: 99999999\r\nexpect: 100-continue\r\n\r\n")
            assert (await answer(reader))[0] == 413


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with gateway() as g, connected(g.port) as (reader, writer):
        for text in ("one", "two", "three"):
            body = json.dumps({"model": "echo", "prompt": text}).encode()
            writer.write(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        assert [(await answer(reader))[2]["choices"][0]["text"] for _ in range(3)] == ["one", "two", "three"]


async def test_a_client_that_does_not_read_its_stream_meets_the_deadline() -> None:
    async with gateway(settings={"deadline_s": 1.0}) as g, connected(g.port) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        body = json.dumps({"model": "echo", "prompt": "word " * 400_000, "stream": True}).encode()
        writer.write(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        [line] = await g.log.ended(1)
        assert line.error == "deadline_exceeded" and line.total_s < 5
        assert g.service.in_flight == 0
        assert (await g.http.post("/v1/completions", json=ASK)).status_code == 200


async def test_headers_at_the_limit_are_read_and_larger_ones_refused() -> None:
    async with gateway() as g:
        sent = [(name.lower(), value) for name, value in g.http.build_request("GET", "/health").headers.raw]
        used = len("/health") + sum(len(name) + len(value) for name, value in sent) + len("x-pad")
        for extra, status in ((0, 200), (1, 431)):
            pad = "x" * (MOST_HEADER_BYTES - used + extra)
            response = await g.http.get("/health", headers={"x-pad": pad})
            assert response.status_code == status
        assert response.json()["error"]["code"] == "request_header_fields_too_large"
        async with connected(g.port) as (reader, writer):
            path = b"/v1/models/" + b"m" * (MOST_HEADER_BYTES - 20)
            writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await answer(reader))[0] == 431


def nested(levels: int) -> bytes:
    return b'{"a":' * (levels - 1) + b"{}" + b"}" * (levels - 1)


def wide(values: int) -> bytes:
    """An object with a list: two values, a name, and the elements."""
    return b'{"a":[' + b",".join([b'"x,[{"'] * (values - 3)) + b"]}"


@pytest.mark.parametrize(
    ("body", "most", "message"),
    [
        (nested, MOST_LEVELS, "nested too deeply: more than 100 levels"),
        (lambda n: b"[" * n + b"]" * n, MOST_LEVELS, "nested too deeply: more than 100 levels"),
        (wide, MOST_VALUES, "more than 50,000 values"),
        (lambda n: b"[" + b"1" * 4000 + b",1" * ((n - 4002) // 2) + b" " * 9 + b"]", MOST_VALUES * 2, "50,000 values"),
    ],
    ids=["objects", "lists", "values", "numbers"],
)
def test_json_at_its_limit_is_parsed_and_one_above_is_refused(body: Any, most: int, message: str) -> None:
    if most != MOST_VALUES * 2:
        assert parse_json(body(most)) == json.loads(body(most))
        most += 1
    else:
        most += 4004
    with pytest.raises(InvalidRequest, match=message):
        parse_json(body(most))


def test_long_numbers_are_bounded_together() -> None:
    def numbers(extra: int) -> bytes:
        each = (b"1" * 4000 + b",") * (MOST_LITERAL_BYTES // 4001)
        return b"[" + each + b"1" * (MOST_LITERAL_BYTES - len(each) - 2 + extra) + b"\n \t]"

    assert len(parse_json(numbers(0))) == MOST_LITERAL_BYTES // 4001 + 1  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="bytes of numbers and punctuation"):
        parse_json(numbers(1))


@pytest.mark.parametrize(
    "text", ['a "quoted" \\ , [ { : ] }', "\\", "\\\\", '\\"', "[" * 1000, "é\u2028\0", "\ud800", '"' * 5000]
)
def test_what_is_inside_of_strings_does_not_count(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "MOST_VALUES", 12_000)
    value = {"a": text, text: [text, {"b": text}]}
    assert parse_json(json.dumps(value).encode()) == value


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text('a"\\\\[]{},: \n\u00e9', max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text('a"\\\\[{', max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON_VALUES, st.integers(1, 9), st.sampled_from([None, 2]), st.booleans())
def test_a_body_that_is_checked_in_pieces_is_judged_as_a_whole(
    value: Any, step: int, indent: int | None, is_ascii: bool
) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=is_ascii).encode()
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", body)
    elements = sum(map(outside.count, (b",", b":", b"[", b"{")))
    literal = len(outside.translate(None, b" \n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "STEP_BYTES", step)
        patch.setattr(json_body, "MOST_VALUES", max(elements + 1, body.count(b'"')))
        patch.setattr(json_body, "MOST_LITERAL_BYTES", literal)
        patch.setattr(json_body, "MOST_LEVELS", depth(value))
        assert parse_json(body) == value
        if len(body) <= step:
            return
        for name, most, message in (
            ("MOST_LITERAL_BYTES", literal - 1, "bytes of numbers and punctuation"),
            ("MOST_LEVELS", depth(value) - 1, "nested too deeply"),
            ("MOST_VALUES", elements, "values, field names included"),
        ):
            if most < 0 or (name == "MOST_LITERAL_BYTES" and literal == 0):
                continue
            with pytest.MonkeyPatch.context() as bound, pytest.raises(InvalidRequest, match=message):
                bound.setattr(json_body, name, most)
                parse_json(body)


def depth(value: Any) -> int:
    """Levels of arrays and objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def test_a_large_body_is_checked_in_steps_and_a_cut_one_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    escapes = rb'{"a": "' + rb"\n\\\u0041" * 100_000
    assert len(list(parsing(escapes + b'"}'))) == -(-(len(escapes) + 2) // STEP_BYTES)
    assert parse_json(escapes + b'"}') == {"a": "\n\\A" * 100_000}
    monkeypatch.setattr(json_body, "_parse_exactly", lambda body: pytest.fail("parsed twice"))
    with pytest.raises(InvalidRequest, match="the body is not valid JSON: EOF while parsing an object at line 1"):
        parse_json(escapes + b'"')
    monkeypatch.setattr(json_body, "from_json", lambda body, **_: pytest.fail("parsed"))
    with pytest.raises(InvalidRequest, match="the body is not valid JSON: its last string has no end"):
        parse_json(escapes)


def test_too_many_values_are_refused_before_the_rest_is_checked() -> None:
    steps = parsing(b"[" + b"1," * 1_000_000 + b"1]")
    with pytest.raises(InvalidRequest, match="more than 50,000 values"):
        for _ in range(3):
            next(steps)


def test_huge_numbers_and_duplicates_are_values_that_the_fields_judge() -> None:
    assert parse_json(b'{"a": 1e400, "a": 2, "b": 1e400}') == {"a": 2, "b": float("inf")}
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        with pytest.raises(InvalidRequest, match="is not a number in JSON"):
            parse_json(b'{"a": ' + constant + b"}")


HOSTILE = {
    "fields": json.dumps({f"unknown_field_{i}": i for i in range(60_000)}),
    "messages": json.dumps({"model": "auto", "messages": [{"rol": "user", "content": "x"}] * 80_000}),
    "experts": json.dumps({**ASK, "coe": {"experts": [f"unknown-{i}" for i in range(40_000)]}}),
    "stops": json.dumps({**ASK, "stop": ["a"] * 200_000}),
    "parts": json.dumps({"model": "auto", "messages": [{"role": "user", "content": ["x"] * 100_000}]}),
    "deep": "[" * 5000 + "]" * 5000,
    "digits": '{"seed": [' + ",".join(["1" * 4300] * 900) + "]}",
    "infinite": json.dumps({**ASK, "temperature": 0}).replace("0}", "1e400}"),
    "surrogate name": '{"\\ud800": 1}',
    "long name": json.dumps({**ASK, "x" * 1_000_000: 1}),
    "long model": json.dumps({**ASK, "model": "m" * 4_000_000}),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_body_gets_a_small_answer_and_disturbs_nobody(name: str) -> None:
    """The bound is in CPU seconds: machines are shared. benchmarks/hostile_bodies.py measures the time."""
    path = "/v1/completions" if '"prompt"' in HOSTILE[name] else "/v1/chat/completions"
    async with gateway() as g:
        slowest = 0.0

        async def watch() -> None:
            nonlocal slowest
            while True:
                started = time.process_time()
                await asyncio.sleep(0)
                slowest = max(slowest, time.process_time() - started)

        watching = asyncio.create_task(watch())
        response = await g.http.post(path, content=HOSTILE[name], headers=JSON)
        watching.cancel()
        assert response.status_code in (400, 413) and len(response.content) < 5_000
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert slowest < 1.0, "the event loop goes on"
        assert (await g.http.get("/health")).status_code == 200


async def test_an_answer_with_a_lone_surrogate_is_sent() -> None:
    body = json_body.JsonBody({"text": "a\ud800b"})
    assert json.loads(body.body) == {"text": "a?b"}


async def test_unknown_names_are_found_in_the_turn_of_a_large_body() -> None:
    async with gateway() as g:
        started = time.perf_counter()
        body = {**ASK, "coe": {"experts": [f"echo-{i}" for i in range(5_000)]}}
        response = await g.http.post("/v1/completions", json=body)
        assert response.status_code == 400 and "'echo-0' is not registered" in response.json()["error"]["message"]
        assert time.perf_counter() - started >= REFUSED_S
        [line] = await g.log.ended(1)
        assert (line.model, line.error) == ("echo", "unknown_expert")
