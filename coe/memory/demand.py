"""How much experts are wanted: when each is needed next, and how often it has been asked for of late."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

HALF_LIFE_S: Final = 600.0
"""Seconds after which a request counts half."""
_MOST: Final = 20_000
"""Names that are remembered; beyond, those whose requests count less than `_FORGOTTEN` are dropped."""
_FORGOTTEN: Final = 1e-3


class Demand(NamedTuple):
    """How much an expert is wanted.

    Attributes:
        next_use_s: when it is needed next, on the cache's clock.
        per_s: its requests per second of late.
    """

    next_use_s: float = math.inf
    per_s: float = 0.0


NO_DEMAND: Final = Demand()
"""Of an expert that nothing is known about: it is not expected to be needed again."""


class RecentMix:
    """Exponentially decayed counts of requests by expert: the mix that is expected to continue."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._decay = math.log(2) / half_life_s
        self._counts: dict[str, tuple[float, float]] = {}  # count, when it was true

    def note(self, names: Iterable[str], now_s: float) -> None:
        """Count a request for each of the names."""
        for name in names:
            self._counts[name] = self._count(name, now_s) + 1.0, now_s
        if len(self._counts) > _MOST:
            self._counts = {n: c for n, c in self._counts.items() if self._count(n, now_s) >= _FORGOTTEN}

    def per_s(self, name: str, now_s: float) -> float:
        """Requests per second, as if the recent ones had come evenly."""
        return self._count(name, now_s) * self._decay

    def _count(self, name: str, now_s: float) -> float:
        count, at_s = self._counts.get(name, (0.0, now_s))
        return count * math.exp(self._decay * (at_s - now_s))
