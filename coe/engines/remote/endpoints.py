"""The endpoints of a remote expert: which one gets a request, and how they are doing.

A request goes to the endpoint with the fewest requests in flight for its weight; of equals, by smooth weighted round
robin (nginx). So a slow endpoint gets fewer, and without load the shares are exactly the weights. Nothing is drawn: the
same calls at the same times choose the same endpoints. The state is that of one process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from coe.engines.remote.breaker import Breaker, BreakerSettings, State
from coe.seam import text_of
from registry.errors import without_userinfo
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from coe.errors import CoeError

logger = logging.getLogger(__name__)
_SHOWN_ERROR: Final = 300
"""Most characters of the last error in a state."""


class AllOpen(Exception):
    """No endpoint takes requests now, nor within the time that a request may wait.

    Attributes:
        wait_s: seconds until one is probed. last: the last error of that one.
    """

    def __init__(self, wait_s: float, last: CoeError | None) -> None:
        super().__init__(wait_s)
        self.wait_s, self.last = wait_s, last


@dataclass(slots=True, eq=False)
class Endpoint:
    """One endpoint, and its requests.

    Attributes:
        spec: the expert as this endpoint serves it: `source`, `model` and `api_key_env` are the endpoint's.
        limit: most requests in flight.
        secrets: texts that no message may contain.
        last: its last failure.
        n_answered, n_failed: requests that it has begun to answer, and failures.
    """

    spec: ExpertSpec
    client: AsyncOpenAI
    breaker: Breaker
    weight: float = 1.0
    limit: int = 64
    secrets: tuple[str, ...] = field(default=(), repr=False)
    in_flight: int = 0
    last: CoeError | None = None
    n_answered: int = 0
    n_failed: int = 0
    turn: float = 0.0  # of the round robin


class Pass:
    """A place at an endpoint, from `EndpointPool.acquire` to `release`. How it went counts once."""

    def __init__(self, pool: EndpointPool, endpoint: Endpoint, *, probe: bool) -> None:
        self.endpoint = endpoint
        self._pool, self._probe, self._is_open = pool, probe, True

    def succeeded(self) -> None:
        """The endpoint has begun to answer."""
        self.endpoint.n_answered += 1
        self.endpoint.breaker.succeeded(probe=self._probe)
        self._probe = False
        self._pool.note_change()

    def failed(self, error: CoeError, stated_s: float | None = None) -> None:
        """The endpoint has failed. stated_s: its Retry-After."""
        endpoint, now_s = self.endpoint, self._pool.now_s()
        endpoint.n_failed += 1
        endpoint.last = error
        was = endpoint.breaker.n_opened
        endpoint.breaker.failed(now_s, probe=self._probe, stated_s=stated_s)
        self._probe = False
        if endpoint.breaker.n_opened != was:
            seconds = endpoint.breaker.opens_in_s(now_s)
            logger.warning("%r: %s gets no requests for %.0f s", endpoint.spec.name, endpoint.spec.source, seconds)

    def release(self) -> None:
        """Give the place back; a second time nothing happens."""
        if self._is_open:
            self._is_open = False
            self.endpoint.in_flight -= 1
            self.endpoint.breaker.abandoned(probe=self._probe)
            self._pool.note_change()


class EndpointPool:
    """The endpoints of one expert, at least one. Use inside one event loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, endpoints: Sequence[Endpoint], clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoints = tuple(endpoints)
        self.now_s = clock
        self._changed = asyncio.Event()

    @classmethod
    def of_one(cls, spec: ExpertSpec, client: AsyncOpenAI, limit: int, secrets: tuple[str, ...]) -> EndpointPool:
        """The endpoint of a server that another part supervises: it is never avoided."""
        return cls([Endpoint(spec, client, Breaker(BreakerSettings(failures=0)), limit=limit, secrets=secrets)])

    @property
    def capacity(self) -> int:
        """Requests that may be in flight at the endpoints that are not open; at all if every one is."""
        now_s = self.now_s()
        able = [each.limit for each in self.endpoints if each.breaker.state(now_s) is not State.OPEN]
        return sum(able or (each.limit for each in self.endpoints))

    def choose(self, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The endpoint of the next request; None if each is open, being probed, or full.

        Args:
            tried: by the request before: others are preferred, also those that cool down.
        """
        now_s = self.now_s()
        able = [each for each in self.endpoints if each.breaker.admits(now_s) and each.in_flight < each.limit]
        if not able:
            return None
        order = {each: (each in tried, each.breaker.is_cooling(now_s), each.in_flight / each.weight) for each in able}
        first = min(order.values())
        equals = [each for each in able if order[each] == first]
        for each in equals:
            each.turn += each.weight
        chosen = max(equals, key=lambda each: each.turn)  # the first of equals
        chosen.turn -= sum(each.weight for each in equals)
        return chosen

    async def acquire(self, tried: Collection[Endpoint], most_s: float) -> Pass:
        """A place at an endpoint; waits for a free one, and at most `most_s` seconds for one that is open.

        Raises:
            AllOpen: no endpoint takes requests within that time.
        """
        ends_s = self.now_s() + most_s
        while (chosen := self.choose(tried)) is None:
            now_s = self.now_s()
            opens_in_s = {each: each.breaker.opens_in_s(now_s) for each in self.endpoints}
            if any(each.breaker.state(now_s) is State.CLOSED for each in self.endpoints):  # it is full
                await self._change(min(filter(None, opens_in_s.values()), default=None))
                continue
            first = min(self.endpoints, key=opens_in_s.__getitem__)
            if now_s >= ends_s or now_s + opens_in_s[first] > ends_s:
                raise AllOpen(opens_in_s[first], first.last)
            await self._change(opens_in_s[first] or ends_s - now_s)
        probe = chosen.breaker.begin(self.now_s())
        chosen.in_flight += 1
        return Pass(self, chosen, probe=probe)

    def has_untried(self, tried: Collection[Endpoint]) -> bool:
        """Whether a request may go on at an endpoint where it has not been."""
        now_s = self.now_s()
        return any(each not in tried and each.breaker.admits(now_s) for each in self.endpoints)

    def note_change(self) -> None:
        """Wake the requests that wait for a place."""
        self._changed.set()
        self._changed = asyncio.Event()

    def problem(self) -> str | None:
        """Why no request is answered now; None if an endpoint takes some."""
        now_s = self.now_s()
        if any(each.breaker.state(now_s) is not State.OPEN for each in self.endpoints):
            return None
        wait_s = min(each.breaker.opens_in_s(now_s) for each in self.endpoints)
        which = "its endpoint" if len(self.endpoints) == 1 else f"each of its {len(self.endpoints)} endpoints"
        return f"{which} has failed or accepts no more requests; it is tried again in {wait_s:.0f} s"

    def states(self) -> list[dict[str, Any]]:
        """The state of each endpoint as JSON values, in the order of the configuration; URLs are for operators."""
        now_s = self.now_s()
        return [
            {
                "endpoint": number,
                "url": without_userinfo(each.spec.source),
                "state": each.breaker.state(now_s).value,
                "weight": each.weight,
                "in_flight": each.in_flight,
                "answered": each.n_answered,
                "failed": each.n_failed,
                "opened": each.breaker.n_opened,
                "opens_in_s": round(each.breaker.opens_in_s(now_s), 3),
                "last_error": None if each.last is None else text_of(each.last, _SHOWN_ERROR),
            }
            for number, each in enumerate(self.endpoints)
        ]

    async def close(self) -> None:
        """Close all clients."""
        for each in self.endpoints:
            await each.client.close()

    async def _change(self, most_s: float | None) -> None:
        try:
            async with asyncio.timeout(most_s):
                await self._changed.wait()
        except TimeoutError:
            pass
