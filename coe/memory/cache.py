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
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from coe.errors import BudgetExceeded
from coe.memory.demand import NO_DEMAND, Demand
from coe.memory.eviction import EvictionPolicy, Resident, by_priority, lru
from coe.memory.in_memory import InMemory
from coe.memory.load_times import LoadTimes, Way
from coe.memory.room import Need, OpenSlot, Room, make_room

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

    async def prefetch(self, name: str) -> None:
        """Bring weights closer for a later switch of any slot of this shape; never raises but for a cancellation."""
        ...

    async def close(self) -> None:
        """Free all memory; never raises."""
        ...


@dataclass(slots=True)
class CacheStats:
    """Counters since the start. `switches`: loads into a slot that was open."""

    loads: int = 0
    switches: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    loads_by_name: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class _Place(Generic[T]):
    """A slot with the expert that it serves, `loading` until its weights are in memory. `size_bytes`: counted."""

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
        self._load_times = LoadTimes()
        self._reading_ahead: asyncio.Task[None] | None = None
        self._new_slot, self._stated_need = new_slot, need
        self._policy, self._clock = by_priority(policy), clock
        self._places: dict[str, _Place[T]] = {}
        self._empty: list[_Place[T]] = []  # open slots without an expert
        self._closing: Counter[Hashable] = Counter()
        self._closing_bytes = 0
        self._tasks: set[asyncio.Future[None]] = set()
        self._queue: deque[asyncio.Event] = deque()
        self._watchers: set[asyncio.Event] = set()

    @property
    def resident(self) -> frozenset[str]:
        """Experts whose weights are in memory now."""
        return frozenset(name for name, place in self._places.items() if place.expert is not None)

    @property
    def loading(self) -> frozenset[str]:
        """Experts whose weights are being loaded."""
        return frozenset(name for name, place in self._places.items() if place.expert is None)

    @property
    def used_bytes(self) -> int:
        """Bytes of open slots with their weights, and of closing ones whose memory no load has claimed."""
        return sum(place.size_bytes for place in self._open()) + self._closing_bytes

    @property
    def slots(self) -> int:
        """Slots that are open or open now."""
        return len(self._open())

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
            for name, place in sorted(self._places.items())
        ]

    def peek(self, name: str) -> T | None:
        """The resident expert of that name, without leasing it."""
        place = self._places.get(name)
        return place.expert if place else None

    def room(self, names: Collection[str], keep: Collection[str] = (), *, drain: bool = False) -> frozenset[str] | None:
        """Experts that leave if a lease of `names` is granted now, without waiting or evicting any of `keep`.

        None if it would wait. drain: leased experts may leave too, once their leases have ended.
        """
        room = None if self._queue and not drain else self._plan(set(names), keep, drain=drain)
        if room is None:
            return None
        slots = (*room.closed, *(slot for slot in room.taken.values() if slot is not None))
        return frozenset(slot.resident.name for slot in slots if slot.resident is not None)

    def fits_free(self, *names: str) -> bool:
        """Whether these are resident or loading, or could load without evicting another."""
        return all(name in self._places for name in names) or self._plan(set(names), self._places) is not None

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Start loading all of `names` for a later lease, or none of them; returns immediately.

        Nothing happens while a lease waits, or if the room is held by leases, pins or `keep`: leases are granted in
        order, so a prefetch in that queue would delay the expert at work. The loaded experts are not leased: a lease
        that needs their room evicts them. If loading fails, the next lease retries and raises.

        Returns:
            Whether all of them are resident or loading now.
        """
        if any(name not in self._places for name in names):
            room = None if self._queue else self._plan(set(names), keep)
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
            shape = None if name in self._places else self._need(name).shape
            slot = next((place.slot for place in self._open() if place.need.shape == shape), None)
            if slot is not None:
                self._reading_ahead = asyncio.ensure_future(slot.prefetch(name))
                self._reading_ahead.add_done_callback(_retrieved)
                return

    def expected_load_s(self, name: str) -> float:
        """Expected seconds to load an absent expert now, from the loads so far by the way it would take.

        Raises what `need` does if its size is not known.
        """
        need = self._need(name)
        switches = any(place.need.shape == need.shape for place in self._open())
        if need.slots > 1 and need.size_bytes <= self.budget_bytes - self.used_bytes:
            switches = False  # room for another slot
        way: Way = "switch" if switches else "open"
        return self._load_times.expected_s(name, need.shape, way, need.weight_bytes)

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
            self._wake()

    def unload(self, *names: str) -> asyncio.Future[None]:
        """Start closing the slots of those of `names` that are resident and not leased, pins included.

        Returns:
            Done when they are closed; their bytes count until then.
        """
        places = [self._places[name] for name in names if name in self._places]
        free = [self._remove(place) for place in places if place.expert is not None and not place.leases]
        return self._close_all(free, beyond=sum(place.size_bytes for place in free))

    async def changed(self) -> None:
        """Return after the next end of a lease, of a load, or of the closing of slots."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            await event.wait()
        finally:
            self._watchers.discard(event)

    def measured(self, name: str, weight_bytes: int) -> None:
        """Count a resident expert by measured bytes. If they exceed the budget, the next load makes room."""
        place = self._places.get(name)
        if place is not None and place.expert is not None and place.need.weight_bytes != weight_bytes:
            place.need = replace(place.need, weight_bytes=weight_bytes)
            place.size_bytes = place.need.size_bytes
            self._wake()

    async def aclose(self) -> None:
        """Close every slot. Call it when no lease is held."""
        loading: list[asyncio.Task[Any]] = [place.loading for place in self._places.values() if place.loading]
        loading += [] if self._reading_ahead is None else [self._reading_ahead]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        places = self._open()
        self._places.clear()
        self._empty.clear()
        for place in places:
            await place.slot.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _acquire(self, wanted: set[str]) -> dict[str, _Place[T]]:
        """Wait for the turn and for room, then reserve bytes and leases in one step."""
        turn = asyncio.Event()
        self._queue.append(turn)
        try:
            while self._queue[0] is not turn or (room := self._plan(wanted)) is None:
                turn.clear()
                await turn.wait()
            return self._reserve(wanted, room)
        finally:
            self._queue.remove(turn)
            self._wake()

    def _reserve(self, wanted: set[str], room: Room) -> dict[str, _Place[T]]:
        self._bring_in_to(room)
        places = {name: self._places[name] for name in wanted}
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
        by_key = {id(place): place for place in self._open()}
        closed = [self._remove(by_key[slot.key]) for slot in room.closed]
        former = {name: None if slot is None else self._remove(by_key[slot.key]) for name, slot in room.taken.items()}
        for name, need in needs.items():
            self._places[name] = self._place(name, need, former[name] or new[name])
        # The room of what is closed is promised to the missing, which load after it is free: it counts once.
        freed = self._close_all(closed, beyond=max(0, before - self.used_bytes)) if closed else None
        for name in needs:
            place = self._places[name]
            place.loading = asyncio.ensure_future(self._bring_in(place, former[name], freed))
            place.loading.add_done_callback(_retrieved)

    def _place(self, name: str, need: Need, into: _Place[T] | SlotOf[T]) -> _Place[T]:
        """A place in a new slot, or in that of another place; weights that shrink count until they are replaced."""
        if not isinstance(into, _Place):
            return _Place(name, need, need.size_bytes, into, last_used_s=self._clock())
        size_bytes = max(into.size_bytes, need.weight_bytes + into.need.slot_bytes)
        return _Place(name, need, size_bytes, into.slot, last_used_s=self._clock())

    def _remove(self, place: _Place[T]) -> _Place[T]:
        if place.expert is None:
            self._empty.remove(place)
        else:
            del self._places[place.name]
            self.stats.evictions += 1
        return place

    def _close_all(self, closed: Collection[_Place[T]], beyond: int) -> asyncio.Future[None]:
        """Start closing. beyond: bytes freed in excess of what the pending loads need."""
        shapes = Counter(place.need.shape for place in closed)
        self._closing.update(shapes)
        self._closing_bytes += beyond

        async def close() -> None:
            try:
                for place in closed:
                    await place.slot.close()
            finally:
                self._closing.subtract(shapes)
                self._closing_bytes -= beyond
                self._wake()

        task = asyncio.ensure_future(close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _bring_in(self, place: _Place[T], former: _Place[T] | None, freed: asyncio.Future[None] | None) -> T:
        """Load one expert once its room is free. On failure it leaves the cache, so that a later lease retries."""
        try:
            if freed is not None:
                await asyncio.shield(freed)
            started = self._clock()
            expert = await place.slot.switch(place.name)
            seconds = place.load_s = self._clock() - started
            self.stats.load_s += seconds
            way: Way = "open" if former is None else "switch"
            self._load_times.note(place.name, place.need.shape, way, place.need.weight_bytes, seconds)
        except BaseException:
            await self._give_up(place, former)
            raise
        place.expert, place.loading, place.size_bytes = expert, None, place.need.size_bytes
        self._count(place, switched=former is not None)
        self._wake()
        return expert

    async def _give_up(self, place: _Place[T], former: _Place[T] | None) -> None:
        """After a failed load: the former expert goes on if its slot still serves it; else the slot stays empty.

        A slot that was empty before is closed: its engine may be broken, and a new one may not be.
        """
        del self._places[place.name]
        if former is None or former.expert is None:
            await asyncio.shield(self._close_all([place], beyond=place.size_bytes))
        else:
            self._take_back(former, place)
        self._wake()

    def _take_back(self, former: _Place[T], failed: _Place[T]) -> None:
        if failed.slot.expert is former.expert and former.name not in self._places:
            self._places[former.name] = former
            self.stats.evictions -= 1
        else:  # empty, or its expert has got another slot meanwhile; memory counts as if the switch had succeeded
            former.expert, former.size_bytes = None, failed.size_bytes
            self._empty.append(former)

    def _count(self, place: _Place[T], *, switched: bool) -> None:
        self.stats.loads += 1
        self.stats.switches += switched
        self.stats.loads_by_name[place.name] += 1
        self.stats.bytes_loaded += place.need.weight_bytes

    def _plan(self, wanted: set[str], keep: Collection[str] = (), *, drain: bool = False) -> Room | None:
        """Where the missing of `wanted` go, so that all fit now; None if a lease must end first.

        drain: as if the leases had ended that are not of `wanted` or `keep`.
        """
        missing = {name: self._need(name) for name in wanted if name not in self._places}
        free_bytes = self.budget_bytes - self.used_bytes
        if not missing and free_bytes >= 0:
            return Room()
        return make_room(
            missing,
            self._free(wanted.union(keep), leased=drain),
            opened=Counter(place.need.shape for place in self._open()) + self._closing,
            free_bytes=free_bytes,
            policy=self._policy,
        )

    def _open(self) -> list[_Place[T]]:
        return [*self._places.values(), *self._empty]

    def _free(self, keep: set[str], *, leased: bool = False) -> list[OpenSlot]:
        """Slots that may be taken or closed; with `leased`, also those that may be once their leases have ended."""
        evictable = [
            OpenSlot(id(place), place.need, self._resident(place))
            for name, place in self._places.items()
            if (leased or place.leases == 0) and place.expert is not None and name not in self.pins and name not in keep
        ]
        return evictable + [OpenSlot(id(place), place.need) for place in self._empty]

    def _resident(self, place: _Place[T]) -> Resident:
        demand = self.demand(place.name)
        used = place.last_used_s, place.uses
        priority = self.priorities.get(place.name, 0)
        return Resident(place.name, place.size_bytes, *used, place.load_s, demand, priority)

    def _need(self, name: str) -> Need:
        place = self._places.get(name)
        return self._stated_need(name) if place is None else place.need

    def check_can_ever_fit(self, wanted: Collection[str], needed_by: str | None = None) -> None:
        """Raises BudgetExceeded if these cannot fit in addition to the pinned experts, whatever is evicted."""
        needs = {name: self._need(name) for name in wanted}
        pinned = [place for name, place in self._places.items() if name in self.pins and name not in wanted]
        whose = f"{needed_by!r} needs its members in memory together: " if needed_by and len(wanted) > 1 else ""
        self._check_bytes(needs, sum(place.size_bytes for place in pinned), whose)
        self._check_slots(needs, Counter(place.need.shape for place in pinned), whose)

    def _check_bytes(self, needs: Mapping[str, Need], pinned: int, whose: str) -> None:
        need = sum(each.size_bytes for each in needs.values())
        if need > self.budget_bytes - pinned:
            held = f" of which pinned experts hold {_mib(pinned)}" if pinned else ""
            raise BudgetExceeded(
                f"{whose}{_names(needs)} need {_mib(need)}, the budget is {_mib(self.budget_bytes)}{held}: "
                "raise `host.budget`, or the `budget` of its pool; choose smaller experts, or unpin one"
            )

    def _check_slots(self, needs: Mapping[str, Need], pinned: Mapping[Hashable, int], whose: str) -> None:
        for shape, count in Counter(need.shape for need in needs.values()).items():
            same = {name: need for name, need in needs.items() if need.shape == shape}
            most = min(need.slots for need in same.values())
            if count + pinned.get(shape, 0) > most:
                held = f", of which pinned experts hold {pinned[shape]}" if pinned.get(shape) else ""
                raise BudgetExceeded(
                    f"{whose}{_names(same)} need {count} slots of one shape at a time, and their engine opens "
                    f"{most}{held}: raise its `slots_per_shape`, or unpin an expert"
                )

    def _wake(self) -> None:
        """Let the first waiting lease check again, and those who wait in `changed`."""
        for event in self._watchers:
            event.set()
        if self._queue:
            self._queue[0].set()


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Mark a failure as retrieved: waiting leases raise it, but all of them may have been cancelled."""
    if not task.cancelled():
        task.exception()


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
