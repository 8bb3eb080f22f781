"""A gateway's own HTTP server: its port is shared, and its end leaves requests in progress some time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from api_server import connected

from coe.serve.cluster.ingress import bound
from coe.serve.http.listener import Listener
from coe.serve.http.request_ids import MOST_BYTES, RequestIds

SHARED = (socket.SO_REUSEPORT, socket.SO_REUSEADDR)


class App:
    """An ASGI application that answers with its name: /slow once it is released."""

    def __init__(self, name: str = "app") -> None:
        self.name, self.release, self.begun, self.cancelled = name, asyncio.Event(), asyncio.Event(), False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            self.begun.set()
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.name.encode()})


@asynccontextmanager
async def listening(app: App, port: int = 0, grace_s: float = 5.0) -> AsyncIterator[tuple[Listener, int]]:
    sock = bound("127.0.0.1", port, *SHARED)
    listener = Listener(app, sock, grace_s=grace_s)
    port = sock.getsockname()[1]
    await listener.start()
    try:
        yield listener, port
    finally:
        await listener.close()


async def get(port: int, path: str = "/") -> bytes:
    async with connected(port) as (reader, writer):
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return await asyncio.wait_for(reader.read(), 10)


async def test_it_answers_from_its_start_to_its_end() -> None:
    async with listening(App()) as (listener, port):
        assert listener.is_up
        answer = await get(port)
        assert answer.startswith(b"HTTP/1.1 200") and b"app" in answer and b"server:" not in answer
        await listener.close()
        assert not listener.is_up
        with pytest.raises(OSError):
            await get(port)


async def test_a_request_in_progress_is_answered_while_it_ends_and_idle_connections_close_at_once() -> None:
    app = App()
    async with listening(app) as (listener, port), connected(port) as (idle, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await idle.readline()).startswith(b"HTTP/1.1 200")
        slow = asyncio.create_task(get(port, "/slow"))
        await app.begun.wait()
        closing = asyncio.create_task(listener.close())
        assert (await asyncio.wait_for(idle.read(), 5)).endswith(b"0\r\n\r\n"), "the end of the connection"
        with pytest.raises(OSError):
            await get(port)
        assert not slow.done() and not closing.done()
        app.release.set()
        assert b"app" in await slow
        await asyncio.wait_for(closing, 5)


async def test_a_request_that_is_not_finished_in_time_is_cancelled() -> None:
    app = App()
    async with listening(app, grace_s=0.3) as (listener, port):
        slow = asyncio.create_task(get(port, "/slow"))
        await app.begun.wait()
        await asyncio.wait_for(listener.close(), 5)
        assert not listener.is_up
        (ended,) = await asyncio.gather(slow, return_exceptions=True)
        assert app.cancelled and (isinstance(ended, ConnectionError) or b"200" not in ended)


async def test_several_share_a_port_and_connections_go_to_those_that_are_left() -> None:
    async with listening(App("first")) as (first, port), listening(App("second"), port):
        answers = [await get(port) for _ in range(64)]
        assert {name for name in (b"first", b"second") if any(name in answer for answer in answers)} == {
            b"first",
            b"second",
        }
        await first.close()
        assert all(b"second" in answer for answer in [await get(port) for _ in range(8)])


async def test_a_socket_that_cannot_listen_is_an_error_of_the_start() -> None:
    sock = bound("127.0.0.1", 0)
    sock.close()
    with pytest.raises(OSError):
        await Listener(App(), sock, grace_s=1).start()


@pytest.mark.parametrize(
    ("sent", "kept"),
    [(b"", False), (b"my-id 1", True), (b"x" * MOST_BYTES, True), (b"x" * (MOST_BYTES + 1), False), (b"\xff", False)],
)
async def test_a_response_has_the_id_of_its_request(sent: bytes, kept: bool) -> None:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(b"x-request-id", sent)] if sent else []
    await RequestIds(App())({"type": "http", "path": "/", "headers": headers}, None, send)  # type: ignore[arg-type]
    ((name, value),) = messages[0]["headers"]
    assert name == b"x-request-id" and (value == sent) == kept and 0 < len(value) <= MOST_BYTES
    assert messages[1]["body"] == b"app"
