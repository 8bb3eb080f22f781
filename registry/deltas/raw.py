"""Bytes of tensors, read from their files in pieces."""

from __future__ import annotations

import numpy as np

from registry.deltas.floats import Bytes
from registry.errors import SourceError
from registry.headers import Tensor


def read_bytes(tensor: Tensor, first: int = 0, count: int | None = None) -> Bytes:
    """`count` bytes of a tensor from its byte `first` on; by default all.

    Raises:
        SourceError: its file cannot be read, or has become shorter.
    """
    count = tensor.n_bytes - first if count is None else count
    if tensor.file is None:
        raise SourceError("the weights of a GGUF file are not read as tensors: convert it first")
    try:
        raw = np.fromfile(tensor.file, np.uint8, count, offset=tensor.start + first)
    except (OSError, ValueError) as error:
        raise SourceError(f"{tensor.file} cannot be read: {error}") from error
    if raw.size != count:
        raise SourceError(f"{tensor.file} is truncated: {raw.size:,} bytes of {count:,} at {tensor.start + first:,}")
    return raw
