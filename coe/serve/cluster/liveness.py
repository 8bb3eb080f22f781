"""Liveness: which expert hosts respond. A process that is stopped, frozen or cut off keeps its connections open.

A gateway pings the hosts that have calls of its own. A ping runs on the host's event loop, beside loading and
generation, which run in threads: a long load or a long prompt does not delay it. A host that has not responded for
`Board.silent_s` is avoided until it responds again, and its calls end (`unless_lost`), so that other hosts take them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from coe.serve.cluster.placement import Board, Call

T = TypeVar("T")
log = logging.getLogger("ray.serve")


class HostSilent(Exception):
    """The host of a call does not respond."""


async def unless_lost(call: Call, awaited: Awaitable[T]) -> T:
    """The result of `awaited`.

    Raises:
        HostSilent: the host of the call stopped responding before there was one; `awaited` is cancelled.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:  # costs less than a task for every piece of an answer
            call.on_lost = lambda: _end(loop, limit)
            if call.lost:
                limit.reschedule(loop.time())
            return await awaited
    except TimeoutError:
        if not call.lost:
            raise
        raise HostSilent(call.host) from None
    finally:
        call.on_lost = None


def _end(loop: asyncio.AbstractEventLoop, limit: asyncio.Timeout) -> None:
    def expire() -> None:
        if not limit.expired() and limit.when() is None:
            limit.reschedule(loop.time())

    loop.call_soon_threadsafe(expire)


class Liveness:
    """Pings the hosts of a deployment, one ping at a time for each.

    Args:
        ping: returns when the host of an id has responded, and raises if it cannot be reached.
    """

    def __init__(
        self,
        board: Board,
        deployment: str,
        ping: Callable[[str], Awaitable[object]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._deployment, self._ping, self._clock = board, deployment, ping, clock
        self._pings: dict[str, asyncio.Task[None]] = {}
        self._since: dict[str, float] = {}  # host -> when its oldest ping without a response was sent
        self._stepped_s = clock()

    async def run(self) -> None:
        """Ping until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._period_s)
                self.step()
        finally:
            for ping in self._pings.values():
                ping.cancel()

    def step(self) -> None:
        """Ping each host that matters, and give up those that have not responded in time."""
        now, used = self._clock(), self._board.in_use(self._deployment)
        self._forgive(now)
        for host in self._pings.keys() - used:
            self._pings.pop(host).cancel()
        for host in self._since.keys() - used:
            del self._since[host]
        for host in used - self._pings.keys():
            self._since.setdefault(host, now)
            self._pings[host] = asyncio.ensure_future(self._ask(host))
        for host, since in self._since.items():
            if now - since > self._board.silent_s and self._board.lose(host):
                log.warning("host %s has not responded for %.1f s: other hosts take its calls", host, now - since)

    @property
    def _period_s(self) -> float:
        return min(1.0, self._board.silent_s / 4)

    def _forgive(self, now: float) -> None:
        """Do not count time in which this process did not run: the responses wait to be read."""
        late_s = now - self._stepped_s - 2 * self._period_s
        if late_s > 0:
            self._since = {host: since + late_s for host, since in self._since.items()}
        self._stepped_s = now

    async def _ask(self, host: str) -> None:
        try:
            await self._ping(host)
        except Exception as error:  # a dead process ends its calls by itself; another is pinged again
            log.debug("host %s cannot be pinged: %s", host, error)
        else:
            self._since.pop(host, None)
            if self._board.heard(host):
                log.warning("host %s responds again", host)
        if self._pings.get(host) is asyncio.current_task():
            del self._pings[host]
