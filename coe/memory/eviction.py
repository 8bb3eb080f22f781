"""Eviction policies: pure functions that order evictable experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A resident expert as an eviction policy sees it. `last_used_s`: on the cache's clock."""

    name: str
    size_bytes: int
    last_used_s: float
    uses: int


EvictionPolicy = Callable[[Sequence[Resident]], Sequence[Resident]]
"""Orders evictable experts, next victim first. Leased and pinned experts are never among them."""


def lru(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """Least recently used first; names break ties, so that a simulation repeats."""
    return sorted(evictable, key=lambda resident: (resident.last_used_s, resident.name))


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
