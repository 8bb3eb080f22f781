"""One HTTP exchange: reads a body; sends a JSON body, a stream of events, or an error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import quote

from pydantic_core import PydanticSerializationError, to_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from coe.protocol.errors import retry_after_s
from coe.serve.http.call import Call
from coe.serve.http.json_body import JsonBody
from coe.serve.http.refusals import BodyTimeout, Unauthorized, UnsupportedMediaType
from coe.serve.http.uploads import Uploads

T = TypeVar("T")
MOST_NOTES: Final = 1000
"""Most characters of notes in a header, since proxies refuse long ones. `x-coe-debug: true` returns all of them."""
MOST_SHOWN: Final = 60
"""Most characters of a refused header that an error repeats."""
DIRECT: Final = "direct"
"""`x-coe-router` of a request whose `model` names an expert."""
Failing = Callable[[int, Mapping[str, Any]], Iterable[Mapping[str, Any]]]
"""The last events of a stream after an error, from its HTTP status and OpenAI's `error`."""
_HEAD: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Exchange:
    """One request and its answer over ASGI. Headers disclose the routing decision."""

    def __init__(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        self.call = call
        self.headers = Headers(scope=scope)
        self.debug = self.headers.get("x-coe-debug", "").lower() in ("true", "1")
        self._scope, self._receive, self._send = scope, receive, send
        self._streaming = False
        self._end = b"data: [DONE]\n\n"
        self._failing: Failing = lambda _, error: [{"error": error}]

    async def read(self, uploads: Uploads) -> bytes:
        """The body.

        Raises:
            UnsupportedMediaType: the headers do not declare uncompressed JSON in UTF-8.
            RequestTooLarge, BodyTimeout, Overloaded: as `Uploads.read`.
            ClientDisconnect: the client disconnected.
        """
        check_media(self.headers.get("content-type", ""), self.headers.get("content-encoding", ""))
        length = self.headers.get("content-length", "")
        return await uploads.read(self._message, int(length[:20]) if length.isdecimal() else None)

    async def json(self, body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send one JSON body."""
        self.call.status = status
        response = JsonBody(body, status, {**disclosed(self.call), **(headers or {})})
        await response(self._scope, self._receive, self._send)

    async def json_text(self, body: bytes) -> None:
        """Send a JSON body that is written already."""
        self.call.status = 200
        response = Response(body, media_type="application/json", headers=disclosed(self.call))
        await response(self._scope, self._receive, self._send)

    async def events(self, *events: Mapping[str, Any], last: bool = False) -> None:
        """Send server-sent events; one with a `type` is named so. The first call also sends the headers; `last` appends
        `[DONE]`, or what `ends_with` sets."""
        if not self.call.status:
            self.call.status = 200
            headers = [(name.encode(), value.encode("latin-1")) for name, value in disclosed(self.call).items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEAD + headers})
        data = b"".join(map(_event, events)) + (self._end if last else b"")
        self._streaming = not last
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    def ends_with(self, end: bytes, failing: Failing) -> None:
        """Set how a stream ends: `end` after its last event, and the events of `failing` in place after an error."""
        self._end, self._failing = end, failing

    async def fail(self, error: Exception) -> None:
        """Send an error: with its HTTP status if nothing was sent yet, otherwise as the last events of the stream."""
        sent = self.call.status
        status, body = self.call.failed(error)
        if not sent:
            await self.json(body, status, headers_of(error))
        elif self._streaming:
            self._streaming = False
            data = b"".join(map(_event, self._failing(status, body["error"])))
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

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

    async def _message(self) -> Message:
        """The next ASGI message. A disconnect arrives as a message, or as an exception of Ray Serve's own."""
        try:
            message = await self._receive()
        except Exception as error:
            raise ClientDisconnect from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return message


def headers_of(error: Exception) -> dict[str, str]:
    """The headers of an error's response: when to try again, which credentials are wanted, or that it is the last."""
    headers = {} if (seconds := retry_after_s(error)) is None else {"retry-after": str(seconds)}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTimeout):
        headers["connection"] = "close"
    return headers


def check_media(content_type: str, content_encoding: str) -> None:
    """Accept uncompressed JSON in UTF-8 only.

    A page of another site can post forms and plain text without a preflight, but not JSON.

    Raises:
        UnsupportedMediaType: with what to send.
    """
    if content_type == "application/json" and not content_encoding:
        return
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    charsets = [part.partition("=")[2].strip("\"' ") for part in parameters if part.startswith("charset")]
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        got = f"not {header_text(content_type)[:MOST_SHOWN]!r}" if content_type else "and the request has none"
        raise UnsupportedMediaType(f"the Content-Type must be application/json, {got}")
    if any(charset not in ("utf-8", "utf8", "us-ascii") for charset in charsets):
        raise UnsupportedMediaType("the body must be JSON in UTF-8; other charsets are not supported")
    if content_encoding.strip().lower() not in ("", "identity"):
        got = header_text(content_encoding)[:MOST_SHOWN]
        raise UnsupportedMediaType(f"Content-Encoding {got!r} is not supported: send the body uncompressed")


def disclosed(call: Call) -> dict[str, str]:
    """Headers that disclose expert, policy and confidence, and request fields without effect, as far as known.

    `x-coe-truncated: true`: the router read only the beginning of a prompt; absent if it read all of it.
    `x-coe-notes`: failed experts and truncated inputs; for a stream, those known before its first text. Of several
    prompts: the experts of all, and the lowest confidence. `x-coe-degraded: true`: the policy gave something up, since
    the service is overloaded.
    """
    headers = {"x-coe-decision-id": call.id}
    if call.decisions:
        policy = call.decisions[0].policy
        decisions = [routed.decision for routed in call.decisions]
        headers["x-coe-router"] = quote(policy.name, safe="/ ") if policy else DIRECT
        headers["x-coe-confidence"] = f"{min(decision.confidence for decision in decisions):.4f}"
        if any(decision.truncated for decision in decisions):
            headers["x-coe-truncated"] = "true"
        if any(routed.notes for routed in call.decisions):
            headers["x-coe-degraded"] = "true"
    if experts := call.experts:
        headers["x-coe-expert"] = experts[0] if len(experts) == 1 else header_text(", ".join(experts))
    if notes := call.notes:
        headers["x-coe-notes"] = header_text("; ".join(notes))
    if call.parsed is not None and call.parsed.ignored:
        headers["x-coe-warning"] = f"ignored: {', '.join(call.parsed.ignored)}"
    return headers


def header_text(text: str) -> str:
    """A text as a header value: printable ASCII on one line, at most MOST_NOTES characters."""
    line = " ".join(text.split()).encode("ascii", "replace").decode()
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= MOST_NOTES else printable[: MOST_NOTES - 3] + "..."


def _event(data: Mapping[str, Any]) -> bytes:
    name = f"event: {data['type']}\n".encode() if "type" in data else b""
    try:
        return name + b"data: " + to_json(data) + b"\n\n"  # a fifth of the time of `json`, for every token of a stream
    except PydanticSerializationError:  # a lone surrogate, which an expert's answer may hold and UTF-8 cannot
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return name + f"data: {text}\n\n".encode(errors="replace")
