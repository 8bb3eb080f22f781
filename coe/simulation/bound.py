"""The fewest loads that serve requests in a given order: Belady's policy (1966) with full knowledge of that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

from coe.scheduler import Residency


def fewest_loads(order: Sequence[Residency], bytes_of: Mapping[str, int], budget_bytes: int) -> int:
    """Loads of Belady's policy, from an empty memory: evict what is needed furthest in the future.

    A lower bound for every schedule that serves `order`, if all weights have one size and each request needs one of
    them; a good value otherwise, since the best eviction of unequal sizes is NP-hard. Leases are not respected: what
    is in use may leave.
    """
    next_use = _next_uses(order)
    resident: dict[str, int] = {}  # name -> position of its next use
    furthest: list[tuple[int, str]] = []  # (-position, name); entries that are out of date are skipped
    free_bytes, loads = budget_bytes, 0
    for residency, uses in zip(order, next_use, strict=True):
        needed = set(residency)
        for name in residency:
            if name in resident:
                continue
            loads += 1
            free_bytes -= bytes_of[name]
            kept: list[tuple[int, str]] = []
            while free_bytes < 0:
                entry = heappop(furthest)
                position, victim = -entry[0], entry[1]
                if resident.get(victim) != position:
                    continue
                if victim in needed:
                    kept.append(entry)
                    continue
                del resident[victim]
                free_bytes += bytes_of[victim]
            for entry in kept:
                heappush(furthest, entry)
            resident[name] = -1
        for name, position in zip(residency, uses, strict=True):
            resident[name] = position
            heappush(furthest, (-position, name))
    return loads


def _next_uses(order: Sequence[Residency]) -> list[tuple[int, ...]]:
    """For each use of weights, the position of the next one; the end if there is none."""
    beyond = len(order)
    last: dict[str, int] = {}
    found: list[tuple[int, ...]] = [()] * len(order)
    for position in range(len(order) - 1, -1, -1):
        found[position] = tuple(last.get(name, beyond) for name in order[position])
        last.update(dict.fromkeys(order[position], position))
    return found
