"""One HTTP exchange: reads a JSON body; sends a JSON body, a stream of events, or an error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from coe.errors import InvalidRequest
from coe.protocol.errors import RequestTooLarge, retry_after_s
from coe.serve.http.service import Call

T = TypeVar("T")
DISCARDED: Final = 8
"""A body over the limit is read and discarded up to this multiple of it, so that the client receives the error."""
MOST_NOTES: Final = 1000
"""Most characters of notes in a header, since proxies refuse long ones. `x-coe-debug: true` returns all of them."""
DIRECT: Final = "direct"
"""`x-coe-router` of a request whose `model` names an expert."""
_HEAD: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Exchange:
    """One request and its answer over ASGI. Headers disclose the routing decision."""

    def __init__(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        self.call = call
        self.debug = Headers(scope=scope).get("x-coe-debug", "").lower() in ("true", "1")
        self._scope, self._receive, self._send = scope, receive, send
        self._streaming = False

    async def read(self, max_bytes: int) -> object:
        """The JSON value of the body.

        Raises:
            RequestTooLarge: the body exceeds `max_bytes`.
            InvalidRequest: the body is not JSON in UTF-8.
            ClientDisconnect: the client disconnected.
        """
        return parse_json(await self._body(max_bytes))

    async def json(self, body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send one JSON body."""
        self.call.status = status
        response = JSONResponse(body, status, {**disclosed(self.call), **(headers or {})})
        await response(self._scope, self._receive, self._send)

    async def events(self, *events: Mapping[str, Any], last: bool = False) -> None:
        """Send server-sent events. The first call also sends the headers; `last` appends `[DONE]`."""
        if not self.call.status:
            self.call.status = 200
            headers = [(name.encode(), value.encode("latin-1")) for name, value in disclosed(self.call).items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEAD + headers})
        data = b"".join(map(_event, events)) + (b"data: [DONE]\n\n" if last else b"")
        self._streaming = not last
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def fail(self, error: Exception) -> None:
        """Send an error: with its HTTP status if nothing was sent yet, otherwise as the last event of the stream."""
        sent = self.call.status
        status, body = self.call.failed(error)
        if not sent:
            seconds = retry_after_s(error)
            await self.json(body, status, {} if seconds is None else {"retry-after": str(seconds)})
        elif self._streaming:
            self._streaming = False
            await self._send({"type": "http.response.body", "body": _event(body), "more_body": False})

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, and cancel it when the client disconnects. Call after the body is read.

        Raises:
            ClientDisconnect: the client disconnected.
        """
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(self._disconnect())
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else watching.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _disconnect(self) -> NoReturn:
        while True:
            await self._message()

    async def _body(self, max_bytes: int) -> bytes:
        """The bytes of the body; at most `max_bytes` are kept in memory."""
        body, size, more = bytearray(), 0, True
        while more and size <= max_bytes * DISCARDED:
            message = await self._message()
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size <= max_bytes:
                body += piece
        if size > max_bytes:
            raise RequestTooLarge(f"the body exceeds {max_bytes:,} bytes (serve.max_body_bytes)")
        return bytes(body)

    async def _message(self) -> Message:
        """The next ASGI message. A disconnect arrives as a message, or as an exception of Ray Serve's own."""
        try:
            message = await self._receive()
        except Exception as error:
            raise ClientDisconnect from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return message


def parse_json(body: bytes) -> object:
    """A JSON value. Raises InvalidRequest with the position of the error."""
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


def disclosed(call: Call) -> dict[str, str]:
    """Headers that disclose expert, policy and confidence, and request fields without effect, as far as known.

    `x-coe-truncated: true`: the router read only the beginning of the prompt; absent if it read all of it.
    `x-coe-notes`: failed experts and truncated inputs; for a stream, those known before its first text.
    """
    headers = {"x-coe-decision-id": call.id}
    if call.routed is not None:
        policy = call.routed.policy
        headers["x-coe-router"] = quote(policy.name, safe="/ ") if policy else DIRECT
        headers["x-coe-confidence"] = f"{call.routed.decision.confidence:.4f}"
        if call.routed.decision.truncated:
            headers["x-coe-truncated"] = "true"
    if call.reply is not None and call.reply.expert is not None:
        headers["x-coe-expert"] = call.reply.expert
    if call.reply is not None and call.reply.notes:
        headers["x-coe-notes"] = header_text("; ".join(call.reply.notes))
    if call.parsed is not None and call.parsed.ignored:
        headers["x-coe-warning"] = f"ignored: {', '.join(call.parsed.ignored)}"
    return headers


def header_text(text: str) -> str:
    """A text as a header value: printable ASCII on one line, at most MOST_NOTES characters."""
    line = " ".join(text.split()).encode("ascii", "replace").decode()
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= MOST_NOTES else printable[: MOST_NOTES - 3] + "..."


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
