"""ExpertCache: resident experts under a byte budget.

    async with cache.lease("a", "b") as experts: ...     # both resident inside the block

Invariants, whatever is cancelled or fails:
  - the bytes of resident and loading experts never exceed the budget;
  - a leased or pinned expert is not evicted; eviction frees memory and writes nothing;
  - a lease holds nothing while it waits, so leases of several experts cannot deadlock;
  - leases are granted in order of arrival, so that small ones do not starve a large one. Throughput does not suffer:
    the scheduler decides which requests ask for a lease at all.

The cache owns base models by bytes; adapter slots on a resident base belong to the engine. It runs in one event loop
without locks: state changes only between awaits. Loading and unloading are injected.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from coe.errors import OutOfMemory
from coe.memory.eviction import EvictionPolicy, Resident, lru, victims

T = TypeVar("T")


@dataclass(slots=True)
class CacheStats:
    """Counters since the start."""

    loads: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    loads_by_name: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class _Slot(Generic[T]):
    """One resident or loading expert; `loading` is set until the weights are in memory."""

    size_bytes: int
    leases: int = 0
    uses: int = 0
    last_used_s: float = 0.0
    expert: T | None = None
    loading: asyncio.Task[T] | None = None


class ExpertCache(Generic[T]):
    """Loads experts on demand and evicts unleased ones to stay within `budget_bytes`.

    Args:
        load: loads an expert; its exceptions reach every lease that waits for it.
        unload: frees an evicted expert's memory; awaited before the memory is reused.
        footprint: bytes that an expert takes, known before loading.
        pins: names that are never evicted once loaded.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        load: Callable[[str], Awaitable[T]],
        unload: Callable[[T], Awaitable[None]],
        footprint: Callable[[str], int],
        pins: Collection[str] = (),
        policy: EvictionPolicy = lru,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.pins = frozenset(pins)  # may be replaced at any time
        self.stats = CacheStats()
        self._load, self._unload, self._footprint = load, unload, footprint
        self._policy, self._clock = policy, clock
        self._slots: dict[str, _Slot[T]] = {}
        self._unloading_bytes = 0
        self._queue: deque[asyncio.Event] = deque()

    @property
    def resident(self) -> frozenset[str]:
        """Experts whose weights are in memory now."""
        return frozenset(name for name, slot in self._slots.items() if slot.expert is not None)

    @property
    def loading(self) -> frozenset[str]:
        """Experts whose weights are being loaded."""
        return frozenset(name for name, slot in self._slots.items() if slot.expert is None)

    @property
    def used_bytes(self) -> int:
        """Bytes of resident and loading experts, and of unloading ones whose memory no load has claimed."""
        return sum(slot.size_bytes for slot in self._slots.values()) + self._unloading_bytes

    def peek(self, name: str) -> T | None:
        """The resident expert of that name, without leasing it."""
        slot = self._slots.get(name)
        return slot.expert if slot else None

    def fits_now(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Whether a lease of these would be granted now, without waiting or evicting any of `keep`."""
        return not self._queue and self._plan(set(names), keep) is not None

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Start loading all of `names` for a later lease, or none of them; returns immediately.

        Nothing happens while a lease waits, or if the room is held by leases, pins or `keep`: leases are granted in
        order, so a prefetch in that queue would delay the expert at work. The loaded experts are not leased: a lease
        that needs their room evicts them. If loading fails, the next lease retries and raises.

        Returns:
            Whether all of them are resident or loading now.
        """
        missing = sorted({name for name in names if name not in self._slots})
        if missing:
            plan = None if self._queue else self._plan(set(names), keep)
            if plan is None:
                return False
            self._bring_in_beside(plan, *missing)
        return True

    @asynccontextmanager
    async def lease(self, *names: str) -> AsyncIterator[Mapping[str, T]]:
        """Keep all of `names` resident inside the block; waits until all of them can be.

        Raises:
            OutOfMemory: they cannot fit in addition to the pinned experts, whatever is evicted.
        """
        wanted = set(names)
        self._check_can_ever_fit(wanted)
        slots = await self._acquire(wanted)
        try:
            experts: dict[str, T] = {}
            for name, slot in slots.items():
                experts[name] = slot.expert if slot.loading is None else await asyncio.shield(slot.loading)  # type: ignore[assignment]
            yield experts
        finally:
            for slot in slots.values():
                slot.leases -= 1
                slot.last_used_s = self._clock()
            self._wake()

    async def aclose(self) -> None:
        """Unload everything. Call it when no lease is held."""
        for name, slot in list(self._slots.items()):
            if slot.loading is not None:
                slot.loading.cancel()
                await asyncio.gather(slot.loading, return_exceptions=True)
            if slot.expert is not None:
                del self._slots[name]
                await self._unload(slot.expert)

    async def _acquire(self, wanted: set[str]) -> dict[str, _Slot[T]]:
        """Wait for the turn and for room, then reserve bytes and leases in one step."""
        turn = asyncio.Event()
        self._queue.append(turn)
        try:
            while self._queue[0] is not turn or (plan := self._plan(wanted)) is None:
                turn.clear()
                await turn.wait()
            return self._reserve(wanted, plan)
        finally:
            self._queue.remove(turn)
            self._wake()

    def _reserve(self, wanted: set[str], evict: tuple[Resident, ...]) -> dict[str, _Slot[T]]:
        self._bring_in_beside(evict, *sorted(name for name in wanted if name not in self._slots))
        slots = {name: self._slots[name] for name in wanted}
        for slot in slots.values():
            slot.leases += 1
            slot.uses += 1
            slot.last_used_s = self._clock()
        return slots

    def _bring_in_beside(self, evict: tuple[Resident, ...], *missing: str) -> None:
        """Start loading what is missing, in the room of what is evicted."""
        evicted = []
        for victim in evict:
            slot = self._slots.pop(victim.name)
            assert slot.expert is not None
            evicted.append(slot.expert)
            self.stats.evictions += 1
        sizes = {name: self._footprint(name) for name in missing}
        # The room of the evicted is promised to the missing, which load after it is free: it counts once.
        beyond = max(0, sum(victim.size_bytes for victim in evict) - sum(sizes.values()))
        freed = asyncio.ensure_future(self._free(evicted, beyond)) if evicted else None
        self._unloading_bytes += beyond
        for name, size_bytes in sizes.items():
            slot = _Slot[T](size_bytes, last_used_s=self._clock())
            slot.loading = asyncio.ensure_future(self._bring_in(name, slot, freed))
            slot.loading.add_done_callback(_retrieved)
            self._slots[name] = slot

    async def _free(self, evicted: list[T], beyond: int) -> None:
        """Unload. `beyond`: bytes freed in excess of what the pending loads need."""
        try:
            for expert in evicted:
                await self._unload(expert)
        finally:
            self._unloading_bytes -= beyond

    async def _bring_in(self, name: str, slot: _Slot[T], freed: asyncio.Future[None] | None) -> T:
        """Load one expert once its room is free. On failure its slot is removed, so that a later lease retries."""
        try:
            if freed is not None:
                await asyncio.shield(freed)
            started = self._clock()
            expert = await self._load(name)
            self.stats.load_s += self._clock() - started
        except BaseException:
            self._slots.pop(name, None)
            self._wake()
            raise
        slot.expert, slot.loading = expert, None
        self.stats.loads += 1
        self.stats.loads_by_name[name] += 1
        self.stats.bytes_loaded += slot.size_bytes
        self._wake()
        return expert

    def _plan(self, wanted: set[str], keep: Collection[str] = ()) -> tuple[Resident, ...] | None:
        """What to evict so that `wanted` fits now; None if a lease must end first."""
        need = sum(self._footprint(name) for name in wanted if name not in self._slots)
        over = self.used_bytes + need - self.budget_bytes
        if over <= 0:
            return ()
        return victims(self._evictable(wanted.union(keep)), over, self._policy)

    def _evictable(self, keep: set[str]) -> list[Resident]:
        return [
            Resident(name, slot.size_bytes, slot.last_used_s, slot.uses)
            for name, slot in self._slots.items()
            if slot.leases == 0 and slot.expert is not None and name not in self.pins and name not in keep
        ]

    def _check_can_ever_fit(self, wanted: set[str]) -> None:
        need = sum(self._footprint(name) for name in wanted)
        pinned = sum(s.size_bytes for n, s in self._slots.items() if n in self.pins and n not in wanted)
        if need > self.budget_bytes - pinned:
            held = f" of which pinned experts hold {_mib(pinned)}" if pinned else ""
            names = ", ".join(map(repr, sorted(wanted)))
            raise OutOfMemory(
                f"{names} need {_mib(need)}, the budget is {_mib(self.budget_bytes)}{held}: "
                "raise `host.budget`, choose a smaller expert, or unpin one"
            )

    def _wake(self) -> None:
        """Let the first waiting lease check again."""
        if self._queue:
            self._queue[0].set()


def _retrieved(task: asyncio.Task[T]) -> None:
    """Mark a failure as retrieved: waiting leases raise it, but all of them may have been cancelled."""
    if not task.cancelled():
        task.exception()


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
