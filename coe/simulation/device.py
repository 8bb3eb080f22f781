"""A simulated device: weights under a byte budget, with plans and policies of `coe.memory`.

It keeps the books of `ExpertCache` under a virtual clock: a load takes the seconds that it is given, nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from coe.memory.demand import NO_DEMAND, Demand
from coe.memory.eviction import EvictionPolicy, Resident
from coe.memory.load_times import LoadTimes
from coe.memory.room import Need, OpenSlot, Room, make_room
from coe.scheduler import Residency
from coe.simulation.host_tier import HostTier


@dataclass(slots=True)
class _Place:
    """Weights on the device. `ready_s`: when they are loaded."""

    name: str
    need: Need
    key: int
    ready_s: float
    load_s: float
    leases: int = 0
    uses: int = 0
    last_used_s: float = 0.0
    loading: bool = True


@dataclass(slots=True)
class Moves:
    """What a device did: `(time, name)` of the start of each load, and of each eviction; reads from the disk."""

    loads: list[tuple[float, str]] = field(default_factory=list)
    evictions: list[tuple[float, str]] = field(default_factory=list)
    bytes_moved: int = 0
    disk_reads: int = 0
    bytes_from_disk: int = 0


class Device:
    """Weights in memory; each expert has a slot of its own.

    Args:
        load_s: seconds that the load of so many bytes from host memory takes.
        host_bytes: of host memory for copies of weights (`HostTier`); None: all weights are there.
        disk_bytes_per_s: what is not there is read with.

    Attributes:
        demand: how much weights are wanted, at a time; for the policy.
        resident: names of the weights in memory.
    """

    def __init__(
        self,
        budget_bytes: int,
        bytes_of: Mapping[str, int],
        *,
        load_s: Callable[[int], float],
        policy: EvictionPolicy,
        host_bytes: int | None = None,
        disk_bytes_per_s: float = 1e9,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.moves = Moves()
        self.resident: dict[str, None] = {}
        self.demand: Callable[[str, float], Demand] = lambda name, now_s: NO_DEMAND
        self.now_s = 0.0
        self._bytes_of, self._load_s, self._policy = bytes_of, load_s, policy
        self._places: dict[str, _Place] = {}
        self._free_bytes = budget_bytes
        self._copies_until_s = 0.0
        self._load_times = LoadTimes()
        self._host: HostTier | None = None
        if host_bytes is not None:
            self._host = HostTier(
                host_bytes,
                bytes_of,
                disk_bytes_per_s=disk_bytes_per_s,
                policy=policy,
                demand=lambda name, now_s: self.demand(name, now_s),
            )

    def room(self, names: Residency, keep: Collection[str], *, drain: bool) -> frozenset[str] | None:
        """See `coe.scheduler.Memory.room`."""
        room = self._plan(names, keep, drain=drain)
        if room is None:
            return None
        return frozenset(slot.resident.name for slot in room.closed if slot.resident is not None)

    def load_s(self, name: str) -> float:
        """See `coe.scheduler.Memory.load_s`: predicted from the loads so far, as a cache does."""
        return self._load_times.expected_s(name, name, "open", self._bytes_of[name])

    def read_ahead(self, names: Residency) -> None:
        """Bring the first absent of these weights from the disk to host memory, if none is being read ahead."""
        if self._host is not None:
            self._host.read_ahead(tuple(name for name in names if name not in self._places), self.now_s)
            self._count_reads(self._host)

    def is_near(self, names: Residency) -> bool:
        """Whether all of the weights are in memory or on their way."""
        return all(name in self._places for name in names)

    @property
    def copies(self) -> bool:
        """Whether weights are being loaded."""
        return self._copies_until_s > self.now_s

    def lease(self, names: Residency) -> float:
        """Hold weights, and load those that are missing; returns when all of them are in memory.

        There must be room (`room`).
        """
        room = self._plan(names, (), drain=False)
        if room is None:
            raise RuntimeError(f"no room for {names}: the rule of admission is wrong")
        for slot in room.closed:
            if slot.resident is not None:
                self._evict(slot.resident.name)
        for name in room.taken:
            self._load(name)
        places = [self._places[name] for name in names]
        for place in places:
            place.leases += 1
            place.uses += 1
            place.last_used_s = self.now_s
        return max(place.ready_s for place in places)

    def ready(self, names: Residency) -> None:
        """The loads of these weights have ended."""
        for name in names:
            place = self._places[name]
            if place.loading:
                place.loading = False
                self.resident[name] = None
                self._load_times.note(name, name, "open", place.need.weight_bytes, place.load_s)

    def release(self, names: Residency) -> None:
        """End a lease."""
        for name in names:
            place = self._places[name]
            place.leases -= 1
            place.last_used_s = self.now_s

    def _plan(self, names: Collection[str], keep: Collection[str], *, drain: bool) -> Room | None:
        missing = {name: self._need(name) for name in names if name not in self._places}
        if not missing:
            return Room()
        return make_room(
            missing,
            [
                OpenSlot(place.key, place.need, self._seen(place))
                for name, place in self._places.items()
                if (drain or not place.leases) and not place.loading and name not in keep and name not in names
            ],
            opened=dict.fromkeys(self._places, 1),
            free_bytes=self._free_bytes,
            policy=self._policy,
        )

    def _seen(self, place: _Place) -> Resident:
        demand = self.demand(place.name, self.now_s)
        return Resident(place.name, place.need.size_bytes, place.last_used_s, place.uses, place.load_s, demand)

    def _need(self, name: str) -> Need:
        return Need(name, self._bytes_of[name])

    def _evict(self, name: str) -> None:
        self._free_bytes += self._places.pop(name).need.size_bytes
        del self.resident[name]
        self.moves.evictions.append((self.now_s, name))

    def _load(self, name: str) -> None:
        need = self._need(name)
        start_s = max(self._copies_until_s, self.now_s)  # copies take turns
        source_s = start_s if self._host is None else self._host.fetch(name, self.now_s)
        self._copies_until_s = max(start_s, source_s) + self._load_s(need.weight_bytes)
        seconds = self._copies_until_s - start_s
        if self._host is not None:
            self._host.hold(name, self._copies_until_s)
            self._count_reads(self._host)
        key = len(self.moves.loads)
        self._places[name] = _Place(name, need, key, self._copies_until_s, seconds, last_used_s=self.now_s)
        self._free_bytes -= need.size_bytes
        self.moves.loads.append((self.now_s, name))
        self.moves.bytes_moved += need.weight_bytes

    def _count_reads(self, host: HostTier) -> None:
        self.moves.disk_reads, self.moves.bytes_from_disk = host.reads, host.bytes_read
