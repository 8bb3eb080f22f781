"""Limits of a connection that uvicorn lacks: seconds and bytes of a request's head, bytes of trailers, requests that
wait for the answers to earlier ones, and clients that stop reading.

A gateway that listens itself uses `BoundedConnection` (`listener.py`). Ray Serve's proxy runs uvicorn too and calls
`install` when it starts (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH). Without these limits a client can hold a
connection, and the memory of its headers, for as long as it likes.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

import httptools
from uvicorn import config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from starlette.middleware import Middleware

HEAD_S: Final = 10.0
"""Seconds until URL and headers are complete, and until the rest of a body that was answered early has arrived."""
MOST_HEAD_BYTES: Final = 64 * 1024
"""Most bytes of URL and headers that are kept, and of trailers. What arrives in one read, at most 256 KiB, is parsed
first."""
MOST_PIPELINED: Final = 100
"""Most requests on one connection that wait for the answers to earlier ones."""
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
        self._data = b""
        self._head_bytes = 0  # of a head, or of what follows or frames a body, in the last reads
        self._progress = False  # whether the last read completed a head or a message, or had a part of a body
        self._in_body = False
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
        """Count the bytes of heads and trailers that are not complete."""
        self._data, self._progress = data, False
        super().data_received(data)
        self._data = b""
        if self._progress:
            self._head_bytes = 0
        elif self._head is not None or self._in_body:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(431)
        self._keep_idle_time()

    def _keep_idle_time(self) -> None:
        """Start the idle time, which uvicorn ends with each read, after one that began no request, as blank lines."""
        waits = self._head is None and not self._in_body and self._is_answered(complete=True)
        if waits and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _is_answered(self, *, complete: bool) -> bool:
        """Whether the answer to the last request has begun, and is complete or not."""
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)  # None before the first head
        return cycle is not None and cycle.response_started and cycle.response_complete == complete

    def on_message_begin(self) -> None:
        """Start the time of a head."""
        super().on_message_begin()
        if self._head is None:
            self._head = self.loop.call_later(HEAD_S, self._refuse, 408)

    def on_headers_complete(self) -> None:
        """End the time of the head."""
        if self._is_upgrade():
            return
        self._progress = self._in_body = True
        if self._head is not None:
            self._head.cancel()
            self._head = None
        if len(self.pipeline) >= MOST_PIPELINED:
            self.transport.abort()
            raise ValueError("too many requests wait on one connection")  # the parser stops
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Note the progress of a body."""
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the time of the rest of a body."""
        if self._is_upgrade():
            return
        self._progress, self._in_body = True, False
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        super().on_message_complete()

    def _is_upgrade(self) -> bool:
        """Whether a request asks for a protocol that is not served, such as `h2c`."""
        is_asked = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        return is_asked and not self._should_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        """Read a request again without its `upgrade`, which a server may ignore: the parser has left out its body.

        uvicorn calls it while it handles the parser's exception, which has the position after the head.
        """
        error = sys.exception()
        if not isinstance(error, httptools.HttpParserUpgrade) or not self._is_upgrade():
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        super().data_received(b"\r\n".join([*lines, b"", b""]) + self._data[error.args[0] :])

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, unless the connection has ended."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

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
        """Answer with a status, unless an answer is on its way, and close."""
        if self.transport.is_closing():
            return
        if self.pipeline or self._is_answered(complete=False):
            self.transport.abort()
            return
        self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
