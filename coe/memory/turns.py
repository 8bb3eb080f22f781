"""Who waits for a change of the cache: leases in order of their arrival, and watchers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


class Turns:
    """The queue of leases, whose first one alone is tried, and those who wait for any change."""

    def __init__(self) -> None:
        self._queue: deque[asyncio.Event] = deque()
        self._watchers: set[asyncio.Event] = set()

    def __bool__(self) -> bool:
        """Whether a lease waits."""
        return bool(self._queue)

    async def first(self, attempt: Callable[[], R | None]) -> R:
        """Wait for the turn, then until `attempt` returns something; it is tried again after every `wake`.

        Whatever `attempt` has done is done in one step: no other lease is tried in between.
        """
        turn = asyncio.Event()
        self._queue.append(turn)
        try:
            while self._queue[0] is not turn or (result := attempt()) is None:
                turn.clear()
                await turn.wait()
            return result
        finally:
            self._queue.remove(turn)
            self.wake()

    async def changed(self) -> None:
        """Return after the next `wake`."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            await event.wait()
        finally:
            self._watchers.discard(event)

    def wake(self) -> None:
        """Let the first waiting lease check again, and those who wait in `changed`."""
        for event in self._watchers:
            event.set()
        if self._queue:
            self._queue[0].set()
