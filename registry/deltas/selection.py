"""The largest weights of many, found in two passes of bounded memory, and their ternary values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from registry.deltas.floats import Values
from registry.deltas.signs import Signs

_HALF = 2**16


@dataclass(slots=True)
class Threshold:
    """Keeps weights whose magnitude exceeds `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int

    def signs(self, values: Values) -> Signs:
        """-1, 0 or 1 of each value; weights are passed once, in one order, since ties count down."""
        magnitude = np.abs(np.ascontiguousarray(values))
        kept = magnitude > self.value
        if self.ties:
            ties = np.flatnonzero(magnitude == self.value)[: self.ties]
            kept.reshape(-1)[ties] = True
            self.ties -= len(ties)
        return (np.sign(values) * kept).astype(np.int8)


def threshold(pieces: Callable[[], Iterable[Values]], keep: int) -> Threshold:
    """What keeps the `keep` largest magnitudes of finite float32 values; zeros are never kept.

    The bits of positive floats are ordered as the floats are, so two histograms of half of them each find the value.

    Args:
        pieces: the values, in pieces; iterated twice.
    """
    if keep < 1:
        return Threshold(np.inf, 0)
    high = sum((np.bincount(_bits(piece) >> 16, minlength=_HALF) for piece in pieces()), np.zeros(_HALF, np.int64))
    bin_high, above = _find(high, keep)
    low = np.zeros(_HALF, np.int64)
    for piece in pieces():
        bits = _bits(piece)
        low += np.bincount(bits[bits >> 16 == bin_high] & (_HALF - 1), minlength=_HALF)
    bin_low, more = _find(low, keep - above)
    value = float(np.array([bin_high << 16 | bin_low], np.uint32).view(np.float32)[0])
    return Threshold(value, keep - above - more) if value else Threshold(0.0, 0)


def _bits(values: Values) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    return np.abs(values).reshape(-1).view(np.uint32)


def _find(histogram: np.ndarray[tuple[int, ...], np.dtype[np.int64]], keep: int) -> tuple[int, int]:
    """The bin that holds the `keep`-th largest, and how many are in the bins above it."""
    from_above = np.cumsum(histogram[::-1])
    found = int(np.searchsorted(from_above, keep))
    if found == len(histogram):
        return 0, int(from_above[-1])  # fewer values than are to be kept
    return len(histogram) - 1 - found, int(from_above[found] - histogram[-1 - found])
