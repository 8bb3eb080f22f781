"""The requests of a host that wait for their weights, and those that are being answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Final

from coe.engines.base import Expert
from coe.errors import CoeError, Overloaded
from coe.memory import Demand, ExpertCache
from coe.scheduler import Residency, Scheduler
from registry.priorities import NORMAL, RequestPriority, level_of

UNLOADED_CAPACITY: Final = 32
"""Assumed capacity of weights that are not resident yet, whose engine has not stated one."""

RECENT: Final = 0.2
"""Weight of the latest answer in the moving average of answer times."""


class AdmissionQueue:
    """Admits waiting requests in the order that `coe.scheduler.Scheduler` decides. Use inside one event loop.

    Args:
        cache: the weights in memory; evicts with the demand of this queue from now on.
        aging_s: seconds after which a request is admitted before all others.
        max_waiting: most requests that wait.
        copy_engine: what loads certain weights (`Scheduler`).

    Attributes:
        answering: admitted requests.
    """

    def __init__(
        self,
        cache: ExpertCache[Expert],
        *,
        aging_s: float,
        max_waiting: int,
        clock: Callable[[], float],
        copy_engine: Callable[[str], Hashable] = lambda ref: None,
    ) -> None:
        self.answering = 0
        self._cache, self._max_waiting, self._clock = cache, max_waiting, clock
        self._scheduler = Scheduler(_Weights(cache), capacity=self._admitted, aging_s=aging_s, copy_engine=copy_engine)
        self._admission: dict[int, asyncio.Future[None]] = {}
        self._answer_s: dict[Residency, float] = {}
        cache.demand = self._demand

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._scheduler)

    @property
    def in_flight(self) -> Counter[str]:
        """Admitted requests on each of the weights, by `name@version`."""
        return self._scheduler.in_flight

    @property
    def wanted(self) -> set[str]:
        """Weights that requests wait for or use, as `name@version`."""
        return self._scheduler.wanted

    def queue_s(self, residencies: Iterable[Residency]) -> dict[Residency, float]:
        """Expected seconds that a new request for these weights waits for earlier ones, from the answers so far."""
        waiting = self._scheduler.waiting
        return {residency: self._seconds_ahead(residency, waiting) for residency in residencies}

    def answer_s(self, residency: Residency) -> float | None:
        """Mean seconds that recent answers took in the engine; None before the first."""
        return self._answer_s.get(residency)

    def capacity(self, residency: Residency) -> int:
        """Requests for these weights that are worth having in flight at once."""
        return min(map(self._capacity, residency))

    async def enter(self, residency: Residency, priority: RequestPriority | None = None) -> None:
        """Wait for the scheduler. On return, the request holds a place on its weights, until `leave`.

        Args:
            priority: of the request; None: normal.

        Raises:
            Overloaded: too many requests are waiting; with the seconds that those ahead are expected to take.
        """
        if len(self) >= self._max_waiting:
            full = Overloaded(f"{len(self)} requests are waiting, which is host.max_waiting; try again later")
            full.retry_after_s = self._seconds_ahead(residency, self._scheduler.waiting)
            raise full
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = self._scheduler.submit(residency, self._clock(), level_of(priority or NORMAL))
        self._admission[number] = admitted
        self.dispatch()
        if not admitted.done():
            self._read_ahead(residency)
        try:
            await admitted
        except asyncio.CancelledError:
            if self._admission.pop(number, None) is None:  # admitted at the same moment: give the place back
                self.leave(residency)
            else:
                self._scheduler.cancel(number)
            raise

    def leave(self, residency: Residency) -> None:
        """Give the place back; others are admitted."""
        self.answering -= 1
        self._scheduler.leave(residency)
        self.dispatch()

    def loaded(self) -> None:
        """The weights of an admitted request are in memory; others may be admitted."""
        self._scheduler.loaded()
        self.dispatch()

    def dispatch(self) -> None:
        """Admit the requests that the scheduler selects. Called after every change; cheap when nothing waits."""
        for number in self._scheduler.admit(self._clock()):
            self.answering += 1
            admitted = self._admission.pop(number)
            if not admitted.done():  # else its task has been cancelled, and gives the place back once it runs
                admitted.set_result(None)

    def note(self, residency: Residency, engine_s: float) -> None:
        """Update the moving average of answer times."""
        mean = self._answer_s.get(residency, engine_s)
        self._answer_s[residency] = mean + RECENT * (engine_s - mean)

    def _read_ahead(self, residency: Residency) -> None:
        """Bring weights that must wait for their room closer meanwhile."""
        with suppress(CoeError):  # their size is unknown: their load ends with the error
            self._cache.read_ahead(*residency)

    def _seconds_ahead(self, residency: Residency, waiting: Mapping[Residency, int]) -> float:
        """Seconds of the waiting requests that use any of the same weights."""
        rivals = (other for other in waiting if not set(other).isdisjoint(residency))
        ahead = sum(waiting[other] * self._answer_s.get(other, 0.0) for other in rivals)
        return ahead / self.capacity(residency)

    def _capacity(self, ref: str) -> int:
        expert = self._cache.peek(ref)
        return UNLOADED_CAPACITY if expert is None else expert.capacity

    def _admitted(self, ref: str) -> int:
        """Most requests that these weights are given at once."""
        ahead: int = getattr(self._cache.peek(ref), "ahead", 0)
        return self._capacity(ref) + ahead

    def _demand(self, ref: str) -> Demand:
        return self._scheduler.demand(ref, self._clock())


class _Weights:
    """The weights in a cache, for the scheduler."""

    def __init__(self, cache: ExpertCache[Expert]) -> None:
        self._cache = cache

    @property
    def resident(self) -> Collection[str]:
        """Names of the weights in memory."""
        return self._cache.resident

    def room(self, names: Residency, keep: Collection[str], *, drain: bool) -> frozenset[str] | None:
        """See `Memory.room`; weights of unknown size can load: their load ends with the error."""
        try:
            return self._cache.room(names, keep, drain=drain)
        except CoeError:
            return frozenset()

    def load_s(self, name: str) -> float:
        """See `Memory.load_s`; 0 for weights of unknown size."""
        try:
            return self._cache.expected_load_s(name)
        except CoeError:
            return 0.0
