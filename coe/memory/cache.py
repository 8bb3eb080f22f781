"""ExpertCache: resident experts under a byte budget.

    async with cache.lease("a", "b") as experts: ...     # both resident inside the block

Invariants, whatever is cancelled or fails:
  - the bytes of open slots, with the weights in them or on their way, never exceed the budget;
  - a leased or pinned expert is not evicted, and its slot is not switched; eviction frees memory and writes nothing;
  - a lease holds nothing while it waits, so leases of several experts cannot deadlock;
  - leases are granted in order of arrival, so that small ones do not starve a large one. Throughput does not suffer:
    the scheduler decides which requests ask for a lease at all.

The cache owns slots and base models by bytes; adapters on a resident base belong to the engine. It runs in one event
loop without locks: state changes only between awaits. Slots are injected.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

from coe.memory.demand import NO_DEMAND, Demand
from coe.memory.eviction import EvictionPolicy, Resident, by_priority, lru
from coe.memory.fitting import Pinned, check_fit
from coe.memory.in_memory import InMemory
from coe.memory.load_times import Way
from coe.memory.loading import CacheStats, Loads
from coe.memory.places import Place, Places, SlotOf
from coe.memory.room import Need, OpenSlot, Room, make_room
from coe.memory.turns import Turns

T = TypeVar("T")


class ExpertCache(Generic[T]):
    """Loads experts on demand and evicts unleased ones to stay within `budget_bytes`.

    Args:
        new_slot: an empty slot for an expert, and for others of its shape; its first switch opens it.
        need: what an expert takes, known before loading.
        pins: names that are never evicted once loaded.
        demand: how much an expert is wanted, for the policy; may be replaced at any time.

    Attributes:
        priorities: of names, 0 without one; those of lower priority are evicted first. May be replaced at any time.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        new_slot: Callable[[str], SlotOf[T]],
        need: Callable[[str], Need],
        pins: Collection[str] = (),
        policy: EvictionPolicy = lru,
        demand: Callable[[str], Demand] = lambda name: NO_DEMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.pins = frozenset(pins)  # may be replaced at any time
        self.demand = demand
        self.priorities: Mapping[str, int] = {}
        self.stats = CacheStats()
        self._reading_ahead: asyncio.Task[None] | None = None
        self._new_slot, self._stated_need = new_slot, need
        self._policy, self._clock = by_priority(policy), clock
        self._turns = Turns()
        self._places: Places[T] = Places(self._turns.wake)
        self._loads = Loads(self._places, self.stats, clock=clock, on_change=self._turns.wake)

    @property
    def resident(self) -> frozenset[str]:
        """Experts whose weights are in memory now."""
        return self._places.resident

    @property
    def loading(self) -> frozenset[str]:
        """Experts whose weights are being loaded."""
        return self._places.loading

    @property
    def used_bytes(self) -> int:
        """Bytes of open slots with their weights, and of closing ones whose memory no load has claimed."""
        return self._places.used_bytes

    @property
    def slots(self) -> int:
        """Slots that are open or open now."""
        return len(self._places.open)

    def in_memory(self) -> list[InMemory]:
        """The experts in memory or loading, sorted by name."""
        now = self._clock()
        return [
            InMemory(
                name,
                place.size_bytes,
                place.leases,
                0.0 if place.leases or place.expert is None else max(0.0, now - place.last_used_s),
                is_loading=place.expert is None,
            )
            for name, place in sorted(self._places.by_name.items())
        ]

    def peek(self, name: str) -> T | None:
        """The resident expert of that name, without leasing it."""
        place = self._places.by_name.get(name)
        return place.expert if place else None

    def room(self, names: Collection[str], keep: Collection[str] = (), *, drain: bool = False) -> frozenset[str] | None:
        """Experts that leave if a lease of `names` is granted now, without waiting or evicting any of `keep`.

        None if it would wait. drain: leased experts may leave too, once their leases have ended.
        """
        room = None if self._turns and not drain else self._plan(set(names), keep, drain=drain)
        if room is None:
            return None
        slots = (*room.closed, *(slot for slot in room.taken.values() if slot is not None))
        return frozenset(slot.resident.name for slot in slots if slot.resident is not None)

    def fits_free(self, *names: str) -> bool:
        """Whether these are resident or loading, or could load without evicting another."""
        return (
            all(name in self._places.by_name for name in names)
            or self._plan(set(names), self._places.by_name) is not None
        )

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Start loading all of `names` for a later lease, or none of them; returns immediately.

        Nothing happens while a lease waits, or if the room is held by leases, pins or `keep`: leases are granted in
        order, so a prefetch in that queue would delay the expert at work. The loaded experts are not leased: a lease
        that needs their room evicts them. If loading fails, the next lease retries and raises.

        Returns:
            Whether all of them are resident or loading now.
        """
        if any(name not in self._places.by_name for name in names):
            room = None if self._turns else self._plan(set(names), keep)
            if room is None:
                return False
            self._bring_in_to(room)
        return True

    def read_ahead(self, *names: str) -> None:
        """Have an open slot bring absent weights closer, such as from disk to memory; no expert loses its room.

        For what must wait before it loads. One expert at a time: the first of `names` that is absent and has an open
        slot of its shape; nothing while another is read.
        """
        if self._reading_ahead is not None and not self._reading_ahead.done():
            return
        for name in names:
            shape = None if name in self._places.by_name else self._need(name).shape
            slot = next((place.slot for place in self._places.open if place.need.shape == shape), None)
            if slot is not None:
                self._reading_ahead = asyncio.ensure_future(slot.prefetch(name))
                self._reading_ahead.add_done_callback(_retrieved)
                return

    def expected_load_s(self, name: str) -> float:
        """Expected seconds to load an absent expert now, from the loads so far by the way it would take.

        Raises what `need` does if its size is not known.
        """
        need = self._need(name)
        switches = any(place.need.shape == need.shape for place in self._places.open)
        if need.slots > 1 and need.size_bytes <= self.budget_bytes - self.used_bytes:
            switches = False  # room for another slot
        way: Way = "switch" if switches else "open"
        return self._loads.times.expected_s(name, need.shape, way, need.weight_bytes)

    @asynccontextmanager
    async def lease(self, *names: str, needed_by: str | None = None) -> AsyncIterator[Mapping[str, T]]:
        """Keep all of `names` resident inside the block; waits until all of them can be.

        Args:
            needed_by: the expert that needs them in memory together, if it is another one.

        Raises:
            BudgetExceeded: they cannot fit in addition to the pinned experts, whatever is evicted.
        """
        wanted = set(names)
        self.check_can_ever_fit(wanted, needed_by)
        places = await self._acquire(wanted)
        try:
            experts: dict[str, T] = {}
            for name, place in places.items():
                experts[name] = place.expert if place.loading is None else await asyncio.shield(place.loading)  # type: ignore[assignment]
            yield experts
        finally:
            for place in places.values():
                place.leases -= 1
                place.last_used_s = self._clock()
            self._turns.wake()

    def unload(self, *names: str) -> asyncio.Future[None]:
        """Start closing the slots of those of `names` that are resident and not leased, pins included.

        Returns:
            Done when they are closed; their bytes count until then.
        """
        places = [self._places.by_name[name] for name in names if name in self._places.by_name]
        free = [self._evict(place) for place in places if place.expert is not None and not place.leases]
        return self._places.close(free, beyond=sum(place.size_bytes for place in free))

    async def changed(self) -> None:
        """Return after the next end of a lease, of a load, or of the closing of slots."""
        await self._turns.changed()

    def measured(self, name: str, weight_bytes: int) -> None:
        """Count a resident expert by measured bytes. If they exceed the budget, the next load makes room."""
        place = self._places.by_name.get(name)
        if place is not None and place.expert is not None and place.need.weight_bytes != weight_bytes:
            place.need = replace(place.need, weight_bytes=weight_bytes)
            place.size_bytes = place.need.size_bytes
            self._turns.wake()

    async def aclose(self) -> None:
        """Close every slot. Call it when no lease is held."""
        loading: list[asyncio.Task[Any]] = [place.loading for place in self._places.by_name.values() if place.loading]
        loading += [] if self._reading_ahead is None else [self._reading_ahead]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await self._places.aclose()

    async def _acquire(self, wanted: set[str]) -> dict[str, Place[T]]:
        """Wait for the turn and for room, then reserve bytes and leases in one step."""

        def attempt() -> dict[str, Place[T]] | None:
            room = self._plan(wanted)
            return None if room is None else self._reserve(wanted, room)

        return await self._turns.first(attempt)

    def _reserve(self, wanted: set[str], room: Room) -> dict[str, Place[T]]:
        self._bring_in_to(room)
        places = {name: self._places.by_name[name] for name in wanted}
        for place in places.values():
            place.leases += 1
            place.uses += 1
            place.last_used_s = self._clock()
        return places

    def _bring_in_to(self, room: Room) -> None:
        """Close what the plan closes, and start loading what is missing in its room."""
        before = self.used_bytes
        # Both raise before anything has changed.
        needs = {name: self._need(name) for name in room.taken}
        new = {name: self._new_slot(name) for name, slot in room.taken.items() if slot is None}
        by_key = {id(place): place for place in self._places.open}
        closed = [self._evict(by_key[slot.key]) for slot in room.closed]
        former = {name: None if slot is None else self._evict(by_key[slot.key]) for name, slot in room.taken.items()}
        for name, need in needs.items():
            self._places.by_name[name] = self._place(name, need, former[name] or new[name])
        # The room of what is closed is promised to the missing, which load after it is free: it counts once.
        freed = self._places.close(closed, beyond=max(0, before - self.used_bytes)) if closed else None
        for name in needs:
            place = self._places.by_name[name]
            place.loading = asyncio.ensure_future(self._loads.bring_in(place, former[name], freed))
            place.loading.add_done_callback(_retrieved)

    def _place(self, name: str, need: Need, into: Place[T] | SlotOf[T]) -> Place[T]:
        """A place in a new slot, or in that of another place; weights that shrink count until they are replaced."""
        if not isinstance(into, Place):
            return Place(name, need, need.size_bytes, into, last_used_s=self._clock())
        size_bytes = max(into.size_bytes, need.weight_bytes + into.need.slot_bytes)
        return Place(name, need, size_bytes, into.slot, last_used_s=self._clock())

    def _evict(self, place: Place[T]) -> Place[T]:
        self.stats.evictions += place.expert is not None
        return self._places.remove(place)

    def _plan(self, wanted: set[str], keep: Collection[str] = (), *, drain: bool = False) -> Room | None:
        """Where the missing of `wanted` go, so that all fit now; None if a lease must end first.

        drain: as if the leases had ended that are not of `wanted` or `keep`.
        """
        missing = {name: self._need(name) for name in wanted if name not in self._places.by_name}
        free_bytes = self.budget_bytes - self.used_bytes
        if not missing and free_bytes >= 0:
            return Room()
        return make_room(
            missing,
            self._free(wanted.union(keep), leased=drain),
            opened=self._places.opened,
            free_bytes=free_bytes,
            policy=self._policy,
        )

    def _free(self, keep: set[str], *, leased: bool = False) -> list[OpenSlot]:
        """Slots that may be taken or closed; with `leased`, also those that may be once their leases have ended."""
        evictable = [
            OpenSlot(id(place), place.need, self._resident(place))
            for name, place in self._places.by_name.items()
            if (leased or place.leases == 0) and place.expert is not None and name not in self.pins and name not in keep
        ]
        return evictable + [OpenSlot(id(place), place.need) for place in self._places.empty]

    def _resident(self, place: Place[T]) -> Resident:
        demand = self.demand(place.name)
        used = place.last_used_s, place.uses
        priority = self.priorities.get(place.name, 0)
        return Resident(place.name, place.size_bytes, *used, place.load_s, demand, priority)

    def _need(self, name: str) -> Need:
        place = self._places.by_name.get(name)
        return self._stated_need(name) if place is None else place.need

    def check_can_ever_fit(self, wanted: Collection[str], needed_by: str | None = None) -> None:
        """Raises BudgetExceeded if these cannot fit in addition to the pinned experts, whatever is evicted."""
        needs = {name: self._need(name) for name in wanted}
        pinned = [place for name, place in self._places.by_name.items() if name in self.pins and name not in wanted]
        held = Pinned.of([(place.need, place.size_bytes) for place in pinned])
        check_fit(needs, self.budget_bytes, held, needed_by)


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Mark a failure as retrieved: waiting leases raise it, but all of them may have been cancelled."""
    if not task.cancelled():
        task.exception()
