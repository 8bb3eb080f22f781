"""Eviction policies: pure functions that order evictable experts.

- `lru`: least recently used first;
- `gdsf`: Greedy-Dual-Size-Frequency (Cherkasova 1998), least frequency * load seconds per byte first;
- `look_ahead`: needed furthest in the future first. The next use is known for experts with waiting requests, and
  expected from recent requests for the others. With the true next uses it is Belady's optimal policy (1966).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from coe.memory.demand import NO_DEMAND, Demand


@dataclass(frozen=True, slots=True)
class Resident:
    """A resident expert as an eviction policy sees it.

    Attributes:
        last_used_s: on the cache's clock.
        uses: leases since it was loaded.
        load_s: seconds that loading it took; 0 if unknown.
        demand: when it is needed next, and how often of late.
    """

    name: str
    size_bytes: int
    last_used_s: float
    uses: int
    load_s: float = 0.0
    demand: Demand = NO_DEMAND
    priority: int = 0


EvictionPolicy = Callable[[Sequence[Resident]], Sequence[Resident]]
"""Orders evictable experts, next victim first. Leased and pinned experts are never among them."""


def lru(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """Least recently used first; names break ties, so that a simulation repeats."""
    return sorted(evictable, key=_recency)


def gdsf(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """Least valuable first: requests per second * load seconds / bytes; then as `lru`.

    The original adds the value of the last victim to each entry, so that old frequencies lose weight. Here the
    frequency itself decays with time, and nothing is remembered between calls.
    """
    return sorted(evictable, key=lambda each: (_worth(each), *_recency(each)))


def look_ahead(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """Needed furthest in the future first; then as `lru`."""
    return sorted(evictable, key=lambda each: (-each.demand.next_use_s, *_recency(each)))


POLICIES: Final[Mapping[str, EvictionPolicy]] = MappingProxyType({"lru": lru, "gdsf": gdsf, "look-ahead": look_ahead})
"""By the name in `host.eviction`."""


def _recency(resident: Resident) -> tuple[float, str]:
    return resident.last_used_s, resident.name


def _worth(resident: Resident) -> float:
    return resident.demand.per_s * resident.load_s / max(1, resident.size_bytes)


def by_priority(policy: EvictionPolicy) -> EvictionPolicy:
    """The policy's order within each priority; experts of lower priority come before all others."""
    return lambda evictable: sorted(policy(evictable), key=lambda resident: resident.priority)


def victims(evictable: Sequence[Resident], need_bytes: int, policy: EvictionPolicy) -> tuple[Resident, ...] | None:
    """The shortest prefix of the policy's order that frees `need_bytes`, without victims that are not needed.

    Returns None if evicting everything frees too little.
    """
    chosen: list[Resident] = []
    freed = 0
    for resident in policy(evictable):
        if freed >= need_bytes:
            break
        chosen.append(resident)
        freed += resident.size_bytes
    if freed < need_bytes:
        return None
    # A large victim late in the order can make earlier small ones unnecessary: keep those.
    for resident in tuple(chosen):
        if freed - resident.size_bytes >= need_bytes:
            chosen.remove(resident)
            freed -= resident.size_bytes
    return tuple(chosen)
