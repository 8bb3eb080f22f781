"""Connections that send their head slowly or without end, or do not read: on uvicorn, as in Ray Serve's proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from api_server import connected

from coe.serve.http import connection
from coe.serve.http.connection import MOST_HEAD_BYTES, MOST_PIPELINED, BoundedConnection, install

BIG = b"x" * 2**20


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers a GET with the length of its headers, /big with 100 MiB, a POST before its body is read, /read after."""
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(100 if scope["path"] == "/big" else 0):
        await send({"type": "http.response.body", "body": BIG, "more_body": True})
    body, more = b"", scope["path"] == "/read"
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.body", "body": body or str(size).encode()})


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server that takes BoundedConnection by uvicorn's default."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "replaced by install")
    assert install() == []
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off"))
    running = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert server.config.http_protocol_class is BoundedConnection
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def gone(server: uvicorn.Server) -> None:
    """Wait until no connection is left."""
    async with asyncio.timeout(10):
        while server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\nx-a:"])
async def test_a_head_that_is_not_complete_in_time_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    async with serving(monkeypatch) as (_, port), connected(port) as (reader, writer):
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer


async def test_a_second_head_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    async with serving(monkeypatch) as (_, port), connected(port) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"0\r\n\r\n")
            await asyncio.sleep(0.2)
        writer.write(b"GET / HTTP/1.1\r\n")
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408")


async def test_headers_without_end_are_refused_and_those_at_the_limit_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (_, port):
        head = b"GET / HTTP/1.1\r\nhost: x\r\nx-pad: "
        for size, status in ((MOST_HEAD_BYTES - 1, b"200"), (MOST_HEAD_BYTES + 1, b"431")):
            async with connected(port) as (reader, writer):
                sent = 0
                for piece in (head, b"x" * (size - len(head))):
                    writer.write(piece)
                    await writer.drain()
                    sent += len(piece)
                    await asyncio.sleep(0.05)
                writer.write(b"\r\n\r\n")
                assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == status, sent


async def test_a_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_S", 0.2)
    async with serving(monkeypatch) as (server, port), connected(port) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        await writer.drain()
        while not server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await gone(server)


async def test_the_rest_of_a_body_that_was_answered_early_must_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    async with serving(monkeypatch) as (server, port), connected(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")

        async def dribble() -> None:
            with suppress(ConnectionError):
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        await gone(server)
        dribbling.cancel()


async def test_blank_lines_between_requests_do_not_keep_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (server, port), connected(port) as (reader, writer):
        monkeypatch.setattr(server.config, "timeout_keep_alive", 0.2)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 10) == b""


async def test_the_idle_time_begins_again_after_the_rest_of_a_body_that_was_answered_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch) as (server, port), connected(port) as (reader, writer):
        monkeypatch.setattr(server.config, "timeout_keep_alive", 0.2)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n{")
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"  }")
        assert await asyncio.wait_for(reader.read(), 10) == b""


async def test_trailers_without_end_are_refused_and_those_at_the_limit_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (server, port):
        for size, kept in ((MOST_HEAD_BYTES, True), (MOST_HEAD_BYTES + 1, False)):
            async with connected(port) as (reader, writer):
                writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
                await reader.readuntil(b"0\r\n\r\n")
                writer.write(b"x: " + b"a" * (size - 3))
                await asyncio.sleep(0.1)
                (open_one,) = server.server_state.connections or (None,)
                assert (open_one is not None) == kept
            await gone(server)


async def test_many_requests_that_wait_on_one_connection_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (_, port):
        get, last = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        for waiting, answered in ((MOST_PIPELINED, MOST_PIPELINED + 1), (MOST_PIPELINED + 1, 0)):
            async with connected(port) as (reader, writer):
                writer.write(get * waiting + last)
                answer = b""
                with suppress(ConnectionError):
                    answer = await asyncio.wait_for(reader.read(), 10)
                assert answer.count(b"HTTP/1.1 200") == answered


@pytest.mark.parametrize("cut", [0, 1, 30, 95, 110])
async def test_a_request_for_another_protocol_is_served_in_http_1_with_its_body(
    monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Java's HttpClient asks for `h2c` in each first request; a client of WebSockets asks for `websocket`."""
    asked = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAE\r\n"
    post = b"POST /read HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n" + asked + b"\r\nthe content"
    async with serving(monkeypatch) as (_, port), connected(port) as (reader, writer):
        for sent in (post[:cut], post[cut:] + b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"):
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(0.02)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.count(b"HTTP/1.1 200") == 2 and b"the content" in answer


async def test_connect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (_, port), connected(port) as (reader, writer):
        writer.write(b"CONNECT example.com:443 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 400")
