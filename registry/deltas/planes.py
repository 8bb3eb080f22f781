"""Lossless chunks: the first bytes of all elements, then the second bytes, and so on, in one zstd frame.

The difference of two similar numbers has zeros in sign, exponent and high mantissa: as planes these are long runs, and
the low mantissa, which is noise, is beside them and not between them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from registry.deltas.floats import Bytes
from registry.errors import SourceError

_LEVEL = 3


def encode_planes(raw: Bytes, item_bytes: int) -> bytes:
    """Compress the bytes of elements of `item_bytes` each."""
    planes = np.ascontiguousarray(raw.reshape(-1, item_bytes).T)
    return bytes(_codec().compress(planes, asbytes=True)) if raw.size else b""


def decode_planes(data: memoryview, n_bytes: int, item_bytes: int) -> Bytes:
    """The `n_bytes` bytes of the elements; no more memory is taken, whatever `data` states.

    Raises:
        SourceError: the data is damaged, or has another size.
    """
    if not n_bytes:
        if len(data):
            raise SourceError(f"an empty tensor is stored in {len(data):,} bytes")
        return np.empty(0, np.uint8)
    try:
        planes = _codec().decompress(data, decompressed_size=n_bytes)
    except (OSError, ValueError) as error:  # of pyarrow: damaged, or not of that size
        raise SourceError(f"its compressed weights are damaged: {error}") from None
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(item_bytes, -1).T).reshape(-1)


@cache
def _codec() -> Any:
    import pyarrow  # half a second to import

    return pyarrow.Codec("zstd", compression_level=_LEVEL)
