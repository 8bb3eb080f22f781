"""An endpoint that sends the bytes it is given, whatever they are: for answers that no server library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from registry.spec import ExpertSpec, Kind

OK = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream"
Send = Callable[[bytes], Awaitable[None]]
Behaviour = Callable[[Send], Awaitable[None]]


@dataclass
class RawEndpoint:
    """Where it listens, and the head and body of each request."""

    port: int
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def spec(self, name: str = "far", **fields: Any) -> ExpertSpec:
        source = f"http://127.0.0.1:{self.port}/v1"
        return ExpertSpec(name=name, kind=Kind.REMOTE, source=source, context_length=100_000, **fields)


@asynccontextmanager
async def raw_endpoint(behave: Behaviour) -> AsyncIterator[RawEndpoint]:
    """An endpoint on this machine that calls `behave(send)` for each request, and closes the connection after it."""
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            running.add(task)

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            size = next(
                int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
            )
            endpoint.requests.append((head, json.loads(await reader.readexactly(size))))
            with suppress(ConnectionError, asyncio.CancelledError):  # the client has read enough, or the test ends
                await behave(send)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = RawEndpoint(server.sockets[0].getsockname()[1])
    try:
        yield endpoint
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def answering(body: bytes | str, head: str = OK) -> Behaviour:
    """Sends this head and body."""

    async def behave(send: Send) -> None:
        await send(f"{head}\r\nconnection: close\r\n\r\n".encode() + (body.encode() if isinstance(body, str) else body))

    return behave


def event(text: Any = None, reason: Any = None, **fields: Any) -> str:
    """A server-sent event with a delta."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice], **fields})}\n\n"


DONE = "data: [DONE]\n\n"
