"""Limits of a connection that uvicorn lacks: seconds and bytes of a request's head, and clients that stop reading.

A gateway that listens itself uses `BoundedConnection` (`listener.py`). Ray Serve's proxy runs uvicorn too and calls
`install` when it starts (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH). Without these limits a client can hold a
connection, and the memory of its headers, for as long as it likes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from uvicorn import config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    from starlette.middleware import Middleware

HEAD_S: Final = 10.0
"""Seconds until URL and headers are complete, and until the rest of a body that was answered early has arrived."""
MOST_HEAD_BYTES: Final = 64 * 1024
"""Most bytes of URL and headers that are kept. What arrives in one read, at most 256 KiB, is parsed first."""
STALLED_S: Final = 60.0
"""Seconds that a client may leave a full buffer of its answer unread."""


def install() -> list[Middleware]:
    """Use BoundedConnection for every uvicorn server that this process starts later. Returns no middleware."""
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedConnection.__name__}"
    return []


class BoundedConnection(HttpToolsProtocol):
    """A connection whose client must send its head, take its answer and end its body in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first head."""
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_S, self._refuse, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        """End all timers."""
        for timer in (self._head, self._stalled, self._rest):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that is not complete."""
        super().data_received(data)
        if self._head is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(431)

    def on_message_begin(self) -> None:
        """Start the time of a head."""
        super().on_message_begin()
        if self._head is None:
            self._head_bytes = 0
            self._head = self.loop.call_later(HEAD_S, self._refuse, 408)

    def on_headers_complete(self) -> None:
        """End the time of the head."""
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the time of the rest of a body."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the time of the rest of a body that was answered before it was complete."""
        super().on_response_complete()
        if self.cycle.more_body and self._rest is None:
            self._rest = self.loop.call_later(HEAD_S, self.transport.abort)

    def pause_writing(self) -> None:
        """Start the time of a client that does not read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """End the time of a client that does not read."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _refuse(self, status: int) -> None:
        """Answer with a status and close."""
        if self.transport.is_closing():
            return
        self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
