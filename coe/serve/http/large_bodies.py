"""Large bodies are parsed one at a time and with pauses, so that they leave most of the event loop's time to others.

The bounds of a body are checked in short steps. Parsing and validating it cannot be interrupted, and a thread would not
help: both hold the interpreter lock. Every bound keeps one parse short; this bounds their sum, however many clients
send large bodies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

from coe.errors import InvalidRequest, Overloaded
from coe.serve.http.json_body import parse_json, parsing

T = TypeVar("T")
SMALL_BYTES: Final = 16 * 1024
"""Bodies up to this size are parsed at once: it takes a millisecond or less, whatever they hold."""
REFUSED_S: Final = 0.05
"""Seconds until a refused large body is answered: a client that repeats it at once gets a small part of the time."""
PAUSE: Final = 3.0
"""Pause after each large body, as a multiple of the time that it took."""


class LargeBodies:
    """Parses bodies. Use inside one event loop.

    Args:
        max_bytes: most bytes of the bodies that wait for their turn.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._waiting_bytes = max_bytes, 0
        self._turn = asyncio.Lock()

    async def parse(self, body: bytes, parse: Callable[[object], T]) -> T:
        """`parse` of the JSON value of a body.

        Raises:
            InvalidRequest: the body is not JSON within the bounds, or `parse` refuses it.
            Overloaded: too many large bodies are waiting.
        """
        if len(body) <= SMALL_BYTES:
            return parse(parse_json(body))
        await self._wait(len(body))
        try:
            return await self._parse(body, parse)
        except InvalidRequest:
            await asyncio.sleep(REFUSED_S)
            raise

    async def _parse(self, body: bytes, parse: Callable[[object], T]) -> T:
        """Between two steps the event loop runs what waits."""
        taken_s, steps = 0.0, parsing(body)
        try:
            while True:
                started = time.perf_counter()
                try:
                    next(steps)
                except StopIteration as done:
                    return parse(done.value)
                finally:
                    taken_s += time.perf_counter() - started
                await asyncio.sleep(0)
        finally:
            asyncio.get_running_loop().call_later(PAUSE * taken_s, self._turn.release)

    async def _wait(self, n_bytes: int) -> None:
        if self._waiting_bytes + n_bytes > self._max_bytes and self._turn.locked():
            raise Overloaded(
                "too many large bodies are waiting to be parsed (serve.max_uploads_bytes); try again later"
            )
        self._waiting_bytes += n_bytes
        try:
            await self._turn.acquire()
        finally:
            self._waiting_bytes -= n_bytes
