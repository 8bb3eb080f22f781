"""The waiting requests of one residency: by priority, and past the aging bound by age."""

from __future__ import annotations

from collections import OrderedDict
from heapq import merge
from itertools import chain, islice, takewhile
from typing import Final

from registry.priorities import NORMAL, level_of

NORMAL_LEVEL: Final = level_of(NORMAL)


class RequestQueue:
    """Ids of requests with the time at which each was submitted; ids grow with time. Never read while empty."""

    __slots__ = ("_levels",)

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[int, float]] = {}  # level -> id -> time; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __getitem__(self, number: int) -> float:
        """When a request was submitted."""
        return next(level[number] for level in self._levels.values() if number in level)

    def add(self, number: int, now_s: float, level: int) -> None:
        """Let a request wait."""
        if level not in self._levels:
            self._levels[level] = OrderedDict()
        self._levels[level][number] = now_s

    def remove(self, number: int) -> None:
        """The request does not wait any more."""
        level = next(level for level, requests in self._levels.items() if number in requests)
        del self._levels[level][number]
        if not self._levels[level]:
            del self._levels[level]

    @property
    def oldest(self) -> int:
        """The request that was submitted first."""
        return min([next(iter(requests)) for requests in self._levels.values()])

    @property
    def oldest_s(self) -> float:
        """When the oldest request was submitted."""
        return min([next(iter(requests.values())) for requests in self._levels.values()])

    @property
    def level(self) -> int:
        """The highest priority of its requests."""
        return max(self._levels)

    def first(self, n: int, before_s: float) -> list[int]:
        """The n requests that go first: those from before that time by age, then the others by priority and age."""
        if len(self._levels) == 1:  # the common case
            [requests] = self._levels.values()
            return list(islice(requests, n))
        levels = [self._levels[level] for level in sorted(self._levels, reverse=True)]
        aged = list(islice(merge(*(takewhile(lambda i, r=r: r[i] < before_s, r) for r in levels)), n))  # type: ignore[misc]
        passed = set(aged)
        return list(islice(chain(aged, (i for requests in levels for i in requests if i not in passed)), n))
