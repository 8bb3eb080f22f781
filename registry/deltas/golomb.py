"""Golomb-Rice codes of sorted positions: the gaps between them, each as a unary quotient and `parameter` low bits.

The sequence of gaps of randomly placed positions is geometric, for which this code is within 3% of the entropy. The
quotients and the low bits are two streams, so that NumPy decodes each as a whole.

S. W. Golomb, "Run-length encodings", 1966; R. F. Rice, "Some practical universal noiseless coding techniques", 1979.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

from registry.deltas.floats import Bytes
from registry.errors import SourceError

_HEADER = struct.Struct("<BII")  # parameter, number of positions, bytes of the quotients
_MOST_PARAMETER = 31
MOST_LENGTH = 2**31
"""Largest `length`: beyond it, quotients and gaps would not fit the arrays that hold them."""


def encode(positions: NDArray[np.int64], length: int) -> bytes:
    """Code strictly increasing positions in [0, length); `length` itself is not stored."""
    count = len(positions)
    parameter = _parameter(count, length)
    gaps = np.diff(positions, prepend=-1) - 1
    unary = np.zeros(int((gaps >> parameter).sum()) + count, np.uint8)
    unary[np.cumsum((gaps >> parameter) + 1) - 1] = 1
    low = np.empty((count, parameter), np.uint8)
    for bit in range(parameter):
        low[:, bit] = (gaps >> bit) & 1
    quotients = np.packbits(unary).tobytes()
    return _HEADER.pack(parameter, count, len(quotients)) + quotients + np.packbits(low).tobytes()


def decode(data: memoryview, length: int) -> tuple[NDArray[np.int64], int]:
    """The positions, and how many bytes of `data` they took. Memory is bounded by `length`, whatever `data` states.

    Raises:
        SourceError: `data` is not such a code of positions in [0, length).
    """
    if len(data) < _HEADER.size:
        raise _damaged("it is cut")
    parameter, count, size = _HEADER.unpack(data[: _HEADER.size])
    if not (parameter <= _MOST_PARAMETER and count <= length <= MOST_LENGTH):
        raise _damaged(f"{count:,} positions of {length:,}, parameter {parameter}")
    low_size, most = _bytes_of(count * parameter), _bytes_of(count + (length >> parameter))
    end = _HEADER.size + size + low_size
    if size > most or len(data) < end:
        raise _damaged(f"{len(data):,} bytes where {end:,} are stated")
    unary = _unpacked(data[_HEADER.size : _HEADER.size + size], size * 8)
    ends = np.flatnonzero(unary)
    if len(ends) != count or size != _bytes_of(int(ends[-1]) + 1 if count else 0):
        raise _damaged(f"{len(ends):,} positions where {count:,} are stated")
    gaps = np.diff(ends, prepend=-1) - 1 << parameter
    low = _unpacked(data[end - low_size : end], count * parameter).reshape(count, parameter)
    for bit in range(parameter):
        gaps |= low[:, bit].astype(np.int64) << bit
    positions = np.cumsum(gaps + 1) - 1
    if count and int(positions[-1]) >= length:
        raise _damaged(f"position {int(positions[-1]):,} of {length:,}")
    return positions, end


def _parameter(count: int, length: int) -> int:
    """The power of two that suits the mean gap (Golomb's choice is ln 2 times the mean)."""
    return min(_MOST_PARAMETER, max(0, round(math.log2(math.log(2) * length / count)))) if count else 0


def _unpacked(data: memoryview, count: int) -> Bytes:
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count)


def _bytes_of(bits: int) -> int:
    return (bits + 7) // 8


def _damaged(why: str) -> SourceError:
    return SourceError(f"the positions of its weights are damaged: {why}")
