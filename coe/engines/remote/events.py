"""Reads the events of an answer from its bytes: JSON objects in server-sent events, or one JSON object as a whole.

Tolerated: comments, `event:`, `id:` and `retry:` lines, carriage returns, a byte order mark, invalid UTF-8 (replaced),
JSON over several `data:` lines, any content type. Everything else raises MalformedStream, as does a body or a line
beyond its limit: no more than one line is held in memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final

from coe.engines.remote.limits import Limits

COMPLETE: Final[dict[str, Any]] = {}
"""The event after the last one of a body that states its end: `[DONE]`, or the end of a whole JSON object."""
PAGE: Final = "it is a page instead of an answer"
"""The message of MalformedStream for a body that is HTML."""
_BOM: Final = b"\xef\xbb\xbf"


class MalformedStream(Exception):
    """The body is not an answer in OpenAI's format, or exceeds a limit; the message has no text of it."""


async def read_events(
    pieces: AsyncIterator[bytes], limits: Limits, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a body; COMPLETE if it states its end.

    Raises:
        MalformedStream: see the module's docstring.
    """
    lines, parser, heard = _Lines(limits), _Parser(limits.line_bytes), clock()
    async for piece in pieces:
        for line in lines.split(piece):
            if (event := parser.feed(line)) is not None:
                heard = clock()
                yield event
                if event is COMPLETE:
                    return
        if clock() - heard > limits.silence_s:
            raise MalformedStream(f"no event came within {limits.silence_s:g} s")
    for event in parser.end(lines.rest):
        yield event


class _Lines:
    """Pieces of a body to lines; enforces the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: list[bytes] = []
        self._n_held = self._n_bytes = 0
        self._after_return = False

    def split(self, piece: bytes) -> list[bytes]:
        """The lines that a piece completes, without their ends."""
        self._n_bytes += len(piece)
        if self._n_bytes > self._limits.stream_bytes:
            most = self._limits.stream_bytes
            raise MalformedStream(f"it exceeds {most:,} bytes, more than max_tokens can need")
        if self._after_return and piece.startswith(b"\n"):  # the other half of an end of line, which is no blank line
            piece = piece[1:]
        self._after_return = piece.endswith(b"\r")
        self._held.append(piece)
        self._n_held += len(piece)
        if self._n_held > self._limits.line_bytes + len(piece):
            raise MalformedStream(f"a line exceeds {self._limits.line_bytes:,} bytes")
        if b"\n" not in piece and b"\r" not in piece:
            return []
        lines = b"".join(self._held).splitlines(keepends=True)
        self._held = [] if lines[-1].endswith((b"\n", b"\r")) else [lines.pop()]
        self._n_held = sum(map(len, self._held))
        return [line.rstrip(b"\r\n") for line in lines]

    @property
    def rest(self) -> bytes:
        """The last line, if the body does not end it."""
        return b"".join(self._held)


class _Parser:
    """Lines to events; holds at most `most_bytes` of an event that is not complete."""

    def __init__(self, most_bytes: int) -> None:
        self._first = True
        self._room = most_bytes
        self._whole: list[bytes] | None = None  # the lines of a body that is one JSON object
        self._data: list[bytes] = []  # of an event that is not complete yet

    def feed(self, line: bytes) -> dict[str, Any] | None:
        """The event that a line completes, if any."""
        if self._first and line.strip():
            self._first = False
            line = line.removeprefix(_BOM)
            self._open(line.lstrip())
        if self._whole is not None:
            self._hold(self._whole, line)
            return None
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if not self._data:
                return COMPLETE if data == b"[DONE]" else self._begin(data)
            self._hold(self._data, data)
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            return _object(data)
        return None

    def end(self, rest: bytes) -> list[dict[str, Any]]:
        """The events that the end of the body completes."""
        event = self.feed(rest)
        if self._whole is not None:
            return [_object(b"\n".join(self._whole)), COMPLETE]
        events = [] if event is None else [event]
        return [*events, _object(b"\n".join(self._data))] if self._data else events

    def _hold(self, lines: list[bytes], line: bytes) -> None:
        self._room -= len(line) + 1
        if self._room < 0:
            raise MalformedStream("an event is longer than max_tokens can need")
        lines.append(line)

    def _open(self, line: bytes) -> None:
        if line.startswith(b"<"):
            raise MalformedStream(PAGE)
        if line.startswith(b"{"):
            self._whole = []

    def _begin(self, data: bytes) -> dict[str, Any] | None:
        """The event of a `data:` line; None if further lines may complete it."""
        if not data:
            return None
        try:
            return _object(data)
        except MalformedStream:
            self._data = [data]
            return None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise MalformedStream(f"an event is not valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise MalformedStream(f"an event is not a JSON object but a {type(value).__name__}")
    return value
