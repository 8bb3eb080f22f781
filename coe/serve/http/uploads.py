"""Uploads: the bodies that are being read, bounded in bytes, seconds and number.

A request takes a place among those in flight only after its body is read, so a client that sends slowly holds an upload
and nothing else. If there are too many uploads, the oldest is given up: slow clients cannot keep others out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import Message

from coe.config import ServeConfig
from coe.errors import Overloaded
from coe.protocol.errors import RequestTooLarge
from coe.serve.http.refusals import BodyTimeout

DISCARDED: Final = 8
"""A body over the limit is read and discarded up to this multiple of it, so that the client receives the error."""
UNDISTURBED_S: Final = 1.0
"""Seconds that an upload is never given up in favour of another."""


@dataclass(slots=True, eq=False)
class _Upload:
    ends: asyncio.Timeout
    began: float
    size: int = 0
    given_up: bool = False


class Uploads:
    """Reads bodies. Use inside one event loop.

    Args:
        settings: `max_body_bytes`, `max_uploads`, `max_uploads_bytes`, `body_timeout_s` and `body_idle_s` are enforced
            here.
    """

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self._running: dict[_Upload, None] = {}  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        """Number of bodies that are being read."""
        return len(self._running)

    async def read(self, receive: Callable[[], Awaitable[Message]], declared_bytes: int | None = None) -> bytes:
        """A whole body.

        Args:
            receive: the next ASGI message of the request.
            declared_bytes: from the header Content-Length.

        Raises:
            RequestTooLarge: it exceeds `max_body_bytes`.
            BodyTimeout: it did not arrive within `body_timeout_s`, nothing arrived for `body_idle_s`, or it was given
                up in favour of other uploads.
            Overloaded: too many uploads started within the last second.
        """
        if declared_bytes is not None and declared_bytes > self._settings.max_body_bytes:
            raise self._too_large()
        upload = self._begin()
        try:
            async with upload.ends:
                return await self._pieces(upload, receive)
        except TimeoutError as error:
            if not upload.ends.expired():
                raise
            raise BodyTimeout(self._why(upload)) from error
        finally:
            self._end(upload)

    async def _pieces(self, upload: _Upload, receive: Callable[[], Awaitable[Message]]) -> bytes:
        most, loop = self._settings.max_body_bytes, asyncio.get_running_loop()
        ends_at = upload.began + self._settings.body_timeout_s
        body: bytes | bytearray = bytearray()
        size, more = 0, True
        while more and size <= most * DISCARDED:
            message = await receive()
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if not more and not body:
                body = piece  # a body in one piece is not copied
            elif size <= most:
                body += piece
                self._hold(upload, len(piece))
            if more and piece and not upload.given_up:
                upload.ends.reschedule(min(ends_at, loop.time() + self._settings.body_idle_s))
        if size > most:
            raise self._too_large()
        return bytes(body)

    def _begin(self) -> _Upload:
        now = asyncio.get_running_loop().time()
        if len(self._running) >= self._settings.max_uploads and not self._give_up_oldest(now, UNDISTURBED_S):
            raise Overloaded(f"{len(self._running)} bodies are being read already (serve.max_uploads); try again later")
        first_s = min(self._settings.body_idle_s, self._settings.body_timeout_s)
        upload = _Upload(asyncio.timeout(first_s), now)
        self._running[upload] = None
        return upload

    def _hold(self, upload: _Upload, n_bytes: int) -> None:
        """Count bytes that are kept in memory; give up the oldest uploads if there are too many."""
        if upload.given_up:
            return
        upload.size += n_bytes
        self._bytes += n_bytes
        now = asyncio.get_running_loop().time()
        while self._bytes > self._settings.max_uploads_bytes and len(self._running) > 1:
            if not self._give_up_oldest(now, 0.0):
                return

    def _give_up_oldest(self, now: float, after_s: float) -> bool:
        oldest = next(iter(self._running))
        if now - oldest.began < after_s:
            return False
        oldest.given_up = True
        oldest.ends.reschedule(now)
        self._end(oldest)
        return True

    def _end(self, upload: _Upload) -> None:
        if upload in self._running:
            del self._running[upload]
            self._bytes -= upload.size

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"the body exceeds {self._settings.max_body_bytes:,} bytes (serve.max_body_bytes)")

    def _why(self, upload: _Upload) -> str:
        settings = self._settings
        if upload.given_up:
            return "the body arrived too slowly: it was given up in favour of other requests; try again"
        return (
            f"the body did not arrive in time: at most {settings.body_timeout_s:g} s in all (serve.body_timeout_s), "
            f"and {settings.body_idle_s:g} s without a byte (serve.body_idle_s)"
        )
