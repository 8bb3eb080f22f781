"""Values of float tensors as NumPy float32, from and to their bytes; NumPy has no bfloat16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Values = NDArray[np.float32]


def to_values(raw: Bytes, dtype: str) -> Values:
    """The numbers in `raw`, a contiguous array of bytes of a type in FLOATS; the conversion is exact."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # NaNs that signal
            return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bytes(values: Values, dtype: str) -> Bytes:
    """The bytes of finite `values` in a type of FLOATS, rounded to the nearest, ties to even."""
    if dtype == "F32":
        return np.ascontiguousarray(values).view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):  # a value beyond the type's range is infinite in it
            return values.astype(np.float16).view(np.uint8)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).view(np.uint8)
