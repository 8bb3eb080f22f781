"""Loading one place: its weights come in, or its slot goes back to what it was."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from coe.memory.copies import HeldCopies
from coe.memory.failures import Failures
from coe.memory.load_times import LoadTimes, Way
from coe.memory.places import Place, Places

T = TypeVar("T")


@dataclass(slots=True)
class CacheStats:
    """Counters since the start. `switches`: loads into a slot that was open. `parked`: slots that were."""

    loads: int = 0
    switches: int = 0
    evictions: int = 0
    parked: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    loads_by_name: Counter[str] = field(default_factory=Counter)


class Loads(Generic[T]):
    """The loads of a cache.

    Args:
        on_change: called when a load has ended.

    Attributes:
        times: how long the loads so far took.
        failures: loads that failed in a row.
    """

    def __init__(
        self,
        places: Places[T],
        stats: CacheStats,
        copies: HeldCopies,
        *,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.times, self.failures = LoadTimes(), Failures(clock)
        self._places, self._stats, self._copies = places, stats, copies
        self._clock, self._on_change = clock, on_change

    async def bring_in(
        self, place: Place[T], former: Place[T] | None, freed: asyncio.Future[None] | None, *, copy: bool
    ) -> T:
        """Load one expert once its room is free. On failure it leaves the cache, so that a later lease retries.

        Args:
            former: the place whose slot it takes; None: a new slot.
            freed: done when the room is free.
            copy: read the copy first that is counted already (`HeldCopies.begin`).
        """
        way = self.way(former, is_copied=place.name in self._copies.names)
        try:
            started = self._clock()
            if copy:
                await self._copies.read(place.slot, place.name)
            seconds = self._clock() - started
            if freed is not None:
                await asyncio.shield(freed)
            started = self._clock()
            expert = await place.slot.switch(place.name)
            seconds = place.load_s = seconds + self._clock() - started
            place.way = way
            self._stats.load_s += seconds
            self.times.note(place.name, place.need.shape, way, place.need.weight_bytes, seconds)
        except BaseException as error:
            if isinstance(error, Exception):
                self.failures.note(place.name, error)
            await self._give_up(place, former)
            raise
        self.failures.clear(place.name)
        place.expert, place.loading, place.size_bytes = expert, None, place.need.size_bytes
        self._count(place, switched=former is not None)
        self._on_change()
        return expert

    @staticmethod
    def way(into: Place[T] | None, *, is_copied: bool) -> Way:
        """How weights come into the slot of a place, or into a new one."""
        if into is None:
            return "open"
        if into.is_parked:
            return "wake"
        return "copy" if is_copied and into.expert is not None else "switch"

    async def _give_up(self, place: Place[T], former: Place[T] | None) -> None:
        """After a failed load: the former expert goes on if its slot still serves it; else the slot stays empty.

        A slot that was empty before is closed: its engine may be broken, and a new one may not be.
        """
        del self._places.by_name[place.name]
        if former is None or former.expert is None:
            await asyncio.shield(self._places.release([place], (), beyond=place.size_bytes))
        else:
            self._take_back(former, place)
        self._on_change()

    def _take_back(self, former: Place[T], failed: Place[T]) -> None:
        if failed.slot.expert is former.expert and former.name not in self._places.by_name:
            self._places.by_name[former.name] = former
            self._stats.evictions -= 1
        else:  # empty, or its expert has got another slot meanwhile; memory counts as if the switch had succeeded
            former.expert, former.size_bytes = None, failed.size_bytes
            self._places.empty.append(former)

    def _count(self, place: Place[T], *, switched: bool) -> None:
        self._stats.loads += 1
        self._stats.switches += switched
        self._stats.loads_by_name[place.name] += 1
        self._stats.bytes_loaded += place.need.weight_bytes
