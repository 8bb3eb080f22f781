"""The requests of a host that wait for their weights, and those that are being answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from coe.engines.base import Expert
from coe.errors import CoeError, Overloaded
from coe.memory import ExpertCache
from coe.scheduler import Residency, Waiting, admit

UNLOADED_CAPACITY = 32
"""Assumed capacity of weights that are not resident yet, whose engine has not stated one."""

RECENT = 0.2
"""Weight of the latest answer in the moving average of answer times."""


@dataclass(slots=True, eq=False)
class _Job:
    """A waiting request. `residency`: the weights that must be in memory to answer it, as `name@version`."""

    id: int
    residency: Residency
    submitted_s: float
    admitted: asyncio.Future[None] = field(repr=False)


class AdmissionQueue:
    """Admits waiting requests in the order that `coe.scheduler.admit` decides. Use inside one event loop.

    Args:
        cache: the weights in memory.
        aging_s: seconds after which a request is admitted before all others.
        max_waiting: most requests that wait.

    Attributes:
        in_flight: admitted requests on each of the weights, by `name@version`.
        answering: admitted requests.
    """

    def __init__(
        self, cache: ExpertCache[Expert], *, aging_s: float, max_waiting: int, clock: Callable[[], float]
    ) -> None:
        self.in_flight: Counter[str] = Counter()
        self.answering = 0
        self._cache, self._aging_s, self._max_waiting, self._clock = cache, aging_s, max_waiting, clock
        self._waiting: dict[int, _Job] = {}
        self._next_id = 0
        self._answer_s: dict[Residency, float] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def wanted(self) -> set[str]:
        """Weights that requests wait for or use, as `name@version`."""
        return {ref for job in self._waiting.values() for ref in job.residency} | set(+self.in_flight)

    def queue_s(self, residencies: Iterable[Residency]) -> dict[Residency, float]:
        """Expected seconds that a new request for these weights waits for earlier ones, from the answers so far."""
        waiting = Counter(job.residency for job in self._waiting.values())
        return {residency: self._seconds_ahead(residency, waiting) for residency in residencies}

    def answer_s(self, residency: Residency) -> float | None:
        """Mean seconds that recent answers took in the engine; None before the first."""
        return self._answer_s.get(residency)

    def capacity(self, residency: Residency) -> int:
        """Requests for these weights that are worth having in flight at once."""
        return min(map(self._capacity, residency))

    async def enter(self, residency: Residency) -> None:
        """Wait for the scheduler. On return, the request holds a place on its weights, until `leave`.

        Raises:
            Overloaded: too many requests are waiting.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, which is host.max_waiting; try again later")
        job = _Job(self._next_id, residency, self._clock(), asyncio.get_running_loop().create_future())
        self._next_id += 1
        self._waiting[job.id] = job
        self.dispatch()
        if not job.admitted.done():
            self._read_ahead(residency)
        try:
            await job.admitted
        except asyncio.CancelledError:
            self._waiting.pop(job.id, None)
            if not job.admitted.cancelled():  # admitted at the same moment: give the place back
                self.leave(residency)
            raise

    def leave(self, residency: Residency) -> None:
        """Give the place back; others are admitted."""
        self._take_places(residency, -1)
        self.dispatch()

    def _take_places(self, residency: Residency, places: int = 1) -> None:
        self.answering += places
        for ref in residency:
            self.in_flight[ref] += places

    def dispatch(self) -> None:
        """Admit the requests that the scheduler selects. Called after every change; cheap when nothing waits."""
        if not self._waiting:
            return
        resident = self._cache.resident
        ids = admit(
            [
                Waiting(job.id, job.residency, job.submitted_s)
                for job in self._waiting.values()
                if not job.admitted.done()
            ],
            resident=resident,
            loading={ref for ref, count in self.in_flight.items() if count and ref not in resident},
            in_flight=self.in_flight,
            capacity=self._admitted,
            loads_now=self._loads_now,
            now_s=self._clock(),
            aging_s=self._aging_s,
        )
        for job in map(self._waiting.pop, ids):
            self._take_places(job.residency)
            job.admitted.set_result(None)

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

    def _loads_now(self, residency: Residency, keep: Collection[str]) -> bool:
        """Whether the weights could load now; so too if their size is unknown, since their load ends with the error."""
        try:
            return self._cache.fits_now(*residency, keep=keep)
        except CoeError:
            return True
