"""The open slots of a cache: which expert is in each, what they count, and those that close."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from coe.memory.load_times import Way
from coe.memory.room import Need

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SlotOf(Protocol[T_co]):
    """A slot that takes experts by name (`coe.engines.base.Slot`)."""

    @property
    def expert(self) -> T_co | None:
        """What it serves; None if it is empty, also after a failed switch that could not go back."""
        ...

    async def switch(self, name: str) -> T_co:
        """Replace the weights; an error reaches every lease that waits for them."""
        ...

    async def prefetch(self, name: str) -> int:
        """Bring weights closer for a later switch of any slot of this shape; never raises but for a cancellation.

        Returns:
            Bytes of the copy in host memory that is kept until it is dropped (`CopyStore.drop`); 0: there is none.
        """
        ...

    async def park(self) -> bool:
        """Free the memory of the weights; never raises.

        Returns:
            Whether the slot stays, without weights: a switch wakes it. False: all of its memory is free.
        """
        ...

    async def close(self) -> None:
        """Free all memory; never raises."""
        ...


@dataclass(slots=True, eq=False)
class Place(Generic[T]):
    """A slot with the expert that it serves, `loading` until its weights are in memory.

    `size_bytes`: counted. `way`: how the weights came in, once they have. Of an empty or parked slot, the name and the
    times are those of its last expert.
    """

    name: str
    need: Need
    size_bytes: int
    slot: SlotOf[T]
    leases: int = 0
    uses: int = 0
    last_used_s: float = 0.0
    load_s: float = 0.0
    expert: T | None = None
    loading: asyncio.Task[T] | None = None
    is_parked: bool = False
    way: Way | None = None


class Places(Generic[T]):
    """The places of a cache, and the bytes that they count. Use inside one event loop.

    Args:
        on_change: called when slots have been closed or parked.

    Attributes:
        by_name: of the experts that are in memory or loading.
        empty: open slots without an expert, parked ones among them.
        parking: number of slots that are being parked.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.by_name: dict[str, Place[T]] = {}
        self.empty: list[Place[T]] = []
        self.parking = 0
        self._on_change = on_change
        self._closing: Counter[Hashable] = Counter()
        self._closing_bytes = 0
        self._tasks: set[asyncio.Future[None]] = set()

    @property
    def resident(self) -> frozenset[str]:
        """Experts whose weights are in memory now."""
        return frozenset(name for name, place in self.by_name.items() if place.expert is not None)

    @property
    def loading(self) -> frozenset[str]:
        """Experts whose weights are being loaded."""
        return frozenset(name for name, place in self.by_name.items() if place.expert is None)

    @property
    def open(self) -> list[Place[T]]:
        """All open slots."""
        return [*self.by_name.values(), *self.empty]

    @property
    def used_bytes(self) -> int:
        """Bytes of open slots with their weights, and of closing ones whose memory no load has claimed."""
        return sum(place.size_bytes for place in self.open) + self._closing_bytes

    @property
    def opened(self) -> Counter[Hashable]:
        """Number of slots that are open, open or close now, by shape."""
        return Counter(place.need.shape for place in self.open) + self._closing

    def remove(self, place: Place[T]) -> Place[T]:
        """Take a place out of the tables: its slot gets another expert, or closes."""
        if place.expert is None:
            self.empty.remove(place)
        else:
            del self.by_name[place.name]
        return place

    def release(self, closed: Collection[Place[T]], parked: Collection[Place[T]], beyond: int) -> asyncio.Future[None]:
        """Start closing and parking the slots of places that are out of the tables.

        Args:
            beyond: bytes freed in excess of what the pending loads need; they count until all of this is done.
        """
        shapes = Counter(place.need.shape for place in (*closed, *parked))
        counted = beyond + sum(place.need.parked_bytes or 0 for place in parked)
        self._closing.update(shapes)
        self._closing_bytes += counted
        self.parking += len(parked)

        async def release() -> None:
            asleep = []
            try:
                for place in closed:
                    await place.slot.close()
                for place in parked:
                    asleep += [place] if await place.slot.park() else []
            finally:
                self._closing.subtract(shapes)
                self._closing_bytes -= counted
                self.parking -= len(parked)
                for place in asleep:
                    place.expert, place.is_parked, place.size_bytes = None, True, place.need.parked_bytes or 0
                self.empty += asleep
                self._on_change()

        task = asyncio.ensure_future(release())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Close every slot, after those that close or are parked already."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        places = self.open
        self.by_name.clear()
        self.empty.clear()
        for place in places:
            await place.slot.close()
