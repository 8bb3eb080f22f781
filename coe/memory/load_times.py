"""How long loads take: measured by expert and way in, and used to predict the next one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Literal

Way = Literal["open", "wake", "switch", "copy"]
"""How weights come in: into a slot that is opened for them, into one that was parked, or into one that served another
expert, from its files or from a copy in host memory."""

_RECENT: Final = 0.3
"""Weight of the latest load in the moving averages."""
_FIRST_RATE: Final = 1e9
"""Bytes per second that are assumed before any load."""


@dataclass(slots=True)
class _Mean:
    """A moving average of seconds, and of seconds a byte."""

    seconds: float
    per_byte: float

    def note(self, seconds: float, per_byte: float) -> None:
        self.seconds += _RECENT * (seconds - self.seconds)
        self.per_byte += _RECENT * (per_byte - self.per_byte)


class LoadTimes:
    """Moving averages of loads: those of an expert predict its next one; without any, those of its shape, or all."""

    def __init__(self) -> None:
        self._means: dict[tuple[Hashable, ...], _Mean] = {}

    def note(self, name: str, shape: Hashable, way: Way, n_bytes: int, seconds: float) -> None:
        """Count a load that has ended."""
        per_byte = seconds / max(1, n_bytes)
        keys = _keys(name, shape, way)
        for key in keys if n_bytes else keys[:1]:  # without bytes, a load says nothing about others
            if key in self._means:
                self._means[key].note(seconds, per_byte)
            else:
                self._means[key] = _Mean(seconds, per_byte)

    def expected_s(self, name: str, shape: Hashable, way: Way, n_bytes: int) -> float:
        """Expected seconds of a load; before any, those at 1 GB/s."""
        own, *others = _keys(name, shape, way)
        if own in self._means:
            return self._means[own].seconds
        mean = next((self._means[key] for key in others if key in self._means), None)
        return n_bytes * (1 / _FIRST_RATE if mean is None else mean.per_byte)


def _keys(name: str, shape: Hashable, way: Way) -> tuple[tuple[Hashable, ...], ...]:
    """From the most specific to the most general."""
    return ("expert", name, way), ("shape", shape, way), ("way", way), ("all",)
