"""Request ids: the header `x-request-id` of every response, as Ray Serve's proxies set it. Clients log it."""

from __future__ import annotations

from typing import Final
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = b"x-request-id"
MOST_BYTES: Final = 128
"""Most bytes of a client's own id; a longer one is replaced."""
_KNOWN: Final = "coe.request_id"
"""Where the id is kept in the scope of a request."""


class RequestIds:
    """ASGI middleware: returns the id that the client sent, or else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        request_id(scope)  # now: applications further in copy the scope

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id(scope))]}
            await send(message)

        return await self._app(scope, receive, labelled)


def request_id(scope: Scope) -> bytes:
    """The id of a request, the same at every call: the client's, if it is short and printable."""
    known: bytes | None = scope.get(_KNOWN)
    if known is None:
        sent: bytes = next((value for name, value in scope["headers"] if name == HEADER), b"")
        fits = 0 < len(sent) <= MOST_BYTES and sent.isascii() and sent.decode().isprintable()
        known = scope[_KNOWN] = sent if fits else str(uuid4()).encode()
    return known
