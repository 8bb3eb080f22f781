"""Ternary chunks: which weights change, and in which direction; the rest stay as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from registry.deltas import golomb
from registry.errors import SourceError

Signs = NDArray[np.int8]


def encode_signs(signs: Signs) -> bytes:
    """Code an array of -1, 0 and 1: Golomb-Rice positions of what is not 0, then one bit each (1 is negative)."""
    positions = np.flatnonzero(signs)
    return golomb.encode(positions, signs.size) + np.packbits(signs[positions] < 0).tobytes()


def decode_signs(data: memoryview, length: int) -> tuple[NDArray[np.int64], Signs]:
    """Positions in [0, length), and the sign (-1 or 1) of each.

    Raises:
        SourceError: the data is damaged; see `golomb.decode`.
    """
    positions, used = golomb.decode(data, length)
    if len(data) - used != (len(positions) + 7) // 8:
        raise SourceError(f"the signs of its weights are damaged: {len(data) - used:,} bytes for {len(positions):,}")
    negative = np.unpackbits(np.frombuffer(data[used:], np.uint8), count=len(positions))
    return positions, (1 - 2 * negative.astype(np.int8)).astype(np.int8)
