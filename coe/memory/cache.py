"""ExpertCache: resident experts under a byte budget.

    async with cache.lease("a", "b") as experts: ...     # both resident inside the block

Invariants, whatever is cancelled or fails:
  - the bytes of open slots, with the weights in them or on their way, never exceed the budget; those of copies in host
    memory never exceed theirs;
  - a leased or pinned expert is not evicted, and its slot is not switched; eviction frees memory and writes nothing;
  - a lease holds nothing while it waits, so leases of several experts cannot deadlock;
  - leases are granted in order of arrival, so that small ones do not starve a large one. Throughput does not suffer:
    the scheduler decides which requests ask for a lease at all.

The cache owns slots and base models by bytes; adapters on a resident base belong to the engine. It shows its state to
one pure function (`coe.memory.plan`), and does what that returns. It runs in one event loop without locks: state
changes only between awaits. Slots are injected.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

from coe.memory.copies import NO_COPIES, CopyStore, HeldCopies
from coe.memory.demand import NO_DEMAND, Demand
from coe.memory.eviction import EvictionPolicy, Resident, by_priority, lru
from coe.memory.failures import Failing
from coe.memory.fitting import Pinned, check_fit
from coe.memory.in_memory import InMemory
from coe.memory.load_times import Way
from coe.memory.loading import CacheStats, Loads
from coe.memory.places import Place, Places, SlotOf
from coe.memory.plan import Action, Copies, Device, Drop, Forget, Open, Park, Prefetch, State, Switch, plan
from coe.memory.room import Need, OpenSlot
from coe.memory.turns import Turns

T = TypeVar("T")


class ExpertCache(Generic[T]):
    """Loads experts on demand and evicts unleased ones to stay within `budget_bytes`.

    Args:
        new_slot: an empty slot for an expert, and for others of its shape; its first switch opens it.
        need: what an expert takes, known before loading.
        pins: names that are never evicted once loaded.
        demand: how much an expert is wanted, for the policy; may be replaced at any time.
        copies: where slots keep copies in host memory.
        most_parked: most parked slots at a time.

    Attributes:
        pins: may be replaced at any time.
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
        copies: CopyStore = NO_COPIES,
        most_parked: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.demand = demand
        self.priorities: Mapping[str, int] = {}
        self.stats = CacheStats()
        self._reading_ahead: asyncio.Task[None] | None = None
        self._new_slot, self._stated_need = new_slot, need
        self._policy, self._clock, self._most_parked = by_priority(policy), clock, most_parked
        self._turns = Turns()
        self._pins = frozenset(pins)
        self._places: Places[T] = Places(self._turns.wake)
        self._copies = HeldCopies(copies, clock=clock, as_resident=self._resident)
        self._loads = Loads(self._places, self.stats, self._copies, clock=clock, on_change=self._turns.wake)

    @property
    def pins(self) -> frozenset[str]:
        """Names that are never evicted once loaded."""
        return self._pins

    @pins.setter
    def pins(self, pins: Collection[str]) -> None:
        self._pins = frozenset(pins)
        self._turns.wake()  # the first lease that waits may have room now, or can never have it

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
    def copied(self) -> frozenset[str]:
        """Experts with a copy in host memory."""
        return self._copies.names

    @property
    def copied_bytes(self) -> int:
        """Bytes of copies in host memory, of reads under way too."""
        return self._copies.used_bytes

    @property
    def copies_budget_bytes(self) -> int:
        """Most bytes of copies in host memory."""
        return self._copies.budget_bytes

    @property
    def failing(self) -> Mapping[str, Failing]:
        """Experts that are not loaded for a while, because their loads failed in a row."""
        return self._loads.failures.now()

    @property
    def slots(self) -> int:
        """Slots that are open, open now or are parked."""
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
        actions = None if self._turns and not drain else self._plan(set(names), keep, drain=drain, copy=False)
        if actions is None:
            return None
        slots = [action.slot for action in actions if isinstance(action, Drop | Park | Switch)]
        return frozenset(slot.resident.name for slot in slots if slot.resident is not None and slot.serves)

    def fits_free(self, *names: str) -> bool:
        """Whether these are resident or loading, or could load without evicting another."""
        return (
            all(name in self._places.by_name for name in names)
            or self._plan(set(names), self._places.by_name, copy=False) is not None
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
            if any(self._loads.failures.of(name) for name in names):
                return False
            actions = None if self._turns else self._plan(set(names), keep)
            if actions is None:
                return False
            self._execute(actions)
        return True

    def read_ahead(self, *names: str) -> None:
        """Have an open slot bring absent weights closer, into host memory; no expert loses its room on the device.

        For what must wait before it loads. One expert at a time: the first of `names` that is absent, has no copy and
        has an open slot of its shape; nothing while another is read.
        """
        if self._reading_ahead is not None and not self._reading_ahead.done():
            return
        for name in names:
            known = name in self._places.by_name or name in self._copies.names or self._loads.failures.of(name)
            need = None if known else self._need(name)
            slot = None if need is None else self._slot_of(need.shape)
            if need is not None and slot is not None:
                copies = self._copies.view(self._places.loading)
                actions = plan(State(copies=copies), {}, ahead={name: need}, policy=self._policy)
                if name in self._host(actions or ()):
                    self._reading_ahead = asyncio.ensure_future(self._copies.read(slot, name))
                    self._reading_ahead.add_done_callback(_retrieved)
                    return

    def _slot_of(self, shape: Hashable) -> SlotOf[T] | None:
        """An open slot of a shape that may read a copy."""
        return next((p.slot for p in self._places.open if p.need.shape == shape and not p.is_parked), None)

    def expected_load_s(self, name: str) -> float:
        """Expected seconds to load an absent expert now, from the loads so far by the way it would take.

        Raises what `need` does if its size is not known.
        """
        need = self._need(name)
        into = min((p for p in self._places.open if p.need.shape == need.shape), key=_readiness, default=None)
        if into is not None and need.slots > 1 and need.size_bytes <= self.budget_bytes - self.used_bytes:
            into = None if _readiness(into) else into  # room for another slot
        way = self._loads.way(into, is_copied=name in self._copies.names)
        return self._loads.times.expected_s(name, need.shape, way, need.weight_bytes)

    @asynccontextmanager
    async def lease(self, *names: str, needed_by: str | None = None) -> AsyncIterator[Mapping[str, T]]:
        """Keep all of `names` resident inside the block; waits until all of them can be.

        Args:
            needed_by: the expert that needs them in memory together, if it is another one.

        Raises:
            BudgetExceeded: they cannot fit in addition to the pinned experts, whatever is evicted; also while it waits,
                since pins and the budget may change.
            LoadFailing: loads of one of them failed in a row, and it is not tried now.
        """
        wanted = set(names)
        self.check(wanted, needed_by)
        places = await self._acquire(wanted, needed_by)
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

    def way_in(self, name: str) -> Way | None:
        """How the weights of a resident expert came in; None if it is not in memory."""
        place = self._places.by_name.get(name)
        return None if place is None or place.loading is not None else place.way

    def unload(self, *names: str) -> asyncio.Future[None]:
        """Start closing the slots of those of `names` that are resident and not leased, pins included.

        Returns:
            Done when they are closed; their bytes count until then.
        """
        places = [self._places.by_name[name] for name in names if name in self._places.by_name]
        free = [self._evict(place) for place in places if place.expert is not None and not place.leases]
        return self._places.release(free, (), beyond=sum(place.size_bytes for place in free))

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

    async def _acquire(self, wanted: set[str], needed_by: str | None) -> dict[str, Place[T]]:
        """Wait for the turn and for room, then reserve bytes and leases in one step."""

        def attempt() -> dict[str, Place[T]] | None:
            self.check(wanted, needed_by)  # a lease that can never be granted would hold up all behind it
            actions = self._plan(wanted)
            return None if actions is None else self._reserve(wanted, actions)

        return await self._turns.first(attempt)

    def _reserve(self, wanted: set[str], actions: Sequence[Action]) -> dict[str, Place[T]]:
        self._execute(actions)
        places = {name: self._places.by_name[name] for name in sorted(wanted)}
        for place in places.values():
            place.leases += 1
            place.uses += 1
            place.last_used_s = self._clock()
        return places

    def _execute(self, actions: Sequence[Action]) -> None:
        """Do what a plan says: all that counts has changed on return, and the rest is under way."""
        before, by_key = self.used_bytes, {id(place): place for place in self._places.open}
        loads = {each.name: each for each in actions if isinstance(each, Open | Switch)}
        # Both raise before anything has changed.
        needs = {name: self._need(name) for name in loads}
        new = {name: self._new_slot(name) for name, each in loads.items() if isinstance(each, Open)}
        closed = [self._evict(by_key[each.slot.key]) for each in actions if isinstance(each, Drop)]
        parked = [self._evict(by_key[each.slot.key]) for each in actions if isinstance(each, Park)]
        former = {n: self._evict(by_key[each.slot.key]) for n, each in loads.items() if isinstance(each, Switch)}
        for name, need in needs.items():
            self._places.by_name[name] = self._place(name, need, former.get(name) or new[name])
        freed = self._release(closed, parked, before) if closed or parked else None
        copied = self._host(actions)
        for name in needs:
            place = self._places.by_name[name]
            self._copies.use(name)
            loading = self._loads.bring_in(place, former.get(name), freed, copy=name in copied)
            place.loading = asyncio.ensure_future(loading)
            place.loading.add_done_callback(_retrieved)

    def _release(self, closed: list[Place[T]], parked: list[Place[T]], before: int) -> asyncio.Future[None]:
        """Close and park slots. Their room is promised to the missing, which load after it is free: it counts once."""
        self.stats.parked += len(parked)
        now = self.used_bytes + sum(place.need.parked_bytes or 0 for place in parked)
        return self._places.release(closed, parked, beyond=max(0, before - now))

    def _host(self, actions: Sequence[Action]) -> set[str]:
        """Free copies in host memory, and count those that are going to be read; returns these."""
        read = set()
        for action in actions:
            if isinstance(action, Forget):
                self._copies.drop(action.name)
            elif isinstance(action, Prefetch):
                self._copies.begin(action.name, action.size_bytes)
                read.add(action.name)
        return read

    def _place(self, name: str, need: Need, into: Place[T] | SlotOf[T]) -> Place[T]:
        """A place in a new slot, or in that of another place; weights that shrink count until they are replaced."""
        if not isinstance(into, Place):
            return Place(name, need, need.size_bytes, into, last_used_s=self._clock())
        size_bytes = max(into.size_bytes, need.size_bytes)
        return Place(name, need, size_bytes, into.slot, last_used_s=self._clock())

    def _evict(self, place: Place[T]) -> Place[T]:
        self.stats.evictions += place.expert is not None
        return self._places.remove(place)

    def _plan(
        self, wanted: set[str], keep: Collection[str] = (), *, drain: bool = False, copy: bool = True
    ) -> tuple[Action, ...] | None:
        """What brings the missing of `wanted` in, so that all fit now; None if a lease must end first.

        drain: as if the leases had ended that are not of `wanted` or `keep`. copy: plan copies in host memory, too.
        """
        missing = {name: self._need(name) for name in wanted if name not in self._places.by_name}
        free_bytes = self.budget_bytes - self.used_bytes
        if not missing and free_bytes >= 0:
            return ()
        free = self._free(wanted.union(keep), leased=drain)
        most_parked = max(0, self._most_parked - self._places.parking)
        device = Device(free, self._places.opened, free_bytes, most_parked)
        copied = copy and any(need.copy_bytes for need in missing.values())
        copies = self._copies.view(self._places.loading) if copied else Copies()
        return plan(State(device, copies), missing, policy=self._policy)

    def _free(self, keep: set[str], *, leased: bool = False) -> list[OpenSlot]:
        """Slots that may be taken or closed; with `leased`, also those that may be once their leases have ended."""
        evictable = [
            OpenSlot(id(place), place.need, self._resident_in(place))
            for name, place in self._places.by_name.items()
            if (leased or place.leases == 0) and place.expert is not None and name not in self.pins and name not in keep
        ]
        return evictable + [self._empty(place, number) for number, place in enumerate(self._places.empty)]

    def _empty(self, place: Place[T], number: int) -> OpenSlot:
        if not place.is_parked:
            return OpenSlot(id(place), place.need)
        need = replace(place.need, weight_bytes=0, slot_bytes=place.size_bytes)
        parked = replace(self._resident_in(place), name=f"{place.name}, parked {number}")
        return OpenSlot(id(place), need, parked, is_parked=True)

    def _resident_in(self, place: Place[T]) -> Resident:
        return self._resident(place.name, place.size_bytes, place.last_used_s, place.uses, place.load_s)

    def _resident(self, name: str, size_bytes: int, last_used_s: float, uses: int, load_s: float) -> Resident:
        priority = self.priorities.get(name, 0)
        return Resident(name, size_bytes, last_used_s, uses, load_s, self.demand(name), priority)

    def _need(self, name: str) -> Need:
        place = self._places.by_name.get(name)
        return self._stated_need(name) if place is None else place.need

    def retry(self, *names: str) -> None:
        """Forget that loads of these failed: the next lease tries again."""
        self._loads.failures.clear(*names)

    def check(self, wanted: Collection[str], needed_by: str | None = None) -> None:
        """What `lease` raises at once: BudgetExceeded, LoadFailing, and what `need` does if a size is not known."""
        for name in sorted(wanted):  # of several, the same one each time
            if name not in self._places.by_name and (failing := self._loads.failures.of(name)) is not None:
                raise failing.error(name)
        needs = {name: self._need(name) for name in wanted}
        pinned = [place for name, place in self._places.by_name.items() if name in self.pins and name not in wanted]
        held = Pinned.of([place.need for place in pinned])
        check_fit(needs, self.budget_bytes, held, needed_by)


def _readiness(place: Place[Any]) -> int:
    """The order in which a load takes the slots of its shape."""
    return 0 if place.expert is None and place.loading is None else 1


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Mark a failure as retrieved: waiting leases raise it, but all of them may have been cancelled."""
    if not task.cancelled():
        task.exception()
