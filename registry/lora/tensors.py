"""The values of tensors in safetensors files: whether they are finite, and whether two tensors are equal.

Read in pieces of bounded size, so that the check of a large embedding takes little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.errors import SourceError
from registry.headers import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIECE: Final = 2**20  # elements
_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element of the types that are read as numbers."""


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or not a number; true for types without such values, and for those not read here."""
    import numpy as np

    if tensor.dtype not in _BYTES:
        return True
    return all(bool(np.isfinite(piece).all()) for piece in _pieces(tensor))


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and values. Types may differ: a bfloat16 copy in float32 is equal."""
    import numpy as np

    if first.shape != second.shape or first.file is None or second.file is None:
        return False
    if first.dtype == second.dtype:
        return all(a == b for a, b in zip(_raw(first), _raw(second), strict=True))
    if first.dtype not in _BYTES or second.dtype not in _BYTES:
        return False
    return all(bool(np.array_equal(a, b)) for a, b in zip(_pieces(first), _pieces(second), strict=True))


def _pieces(tensor: Tensor) -> Iterator[NDArray[np.floating[Any]]]:
    """The values in order, exact: bfloat16 is widened to float32."""
    import numpy as np

    for raw in _raw(tensor):
        if tensor.dtype == "BF16":
            yield (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            yield np.frombuffer(raw, f"<f{_BYTES[tensor.dtype]}")


def _raw(tensor: Tensor) -> Iterator[bytes]:
    """The bytes in pieces of as many elements, whatever the type."""
    path, left = _path(tensor), tensor.n_bytes
    step = _PIECE * max(1, tensor.n_bytes // max(1, tensor.elements))
    try:
        with path.open("rb") as file:
            file.seek(tensor.start)
            while left:
                piece = file.read(min(step, left))
                if not piece:
                    raise SourceError(f"{path} was truncated while it was read")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _path(tensor: Tensor) -> Path:
    if tensor.file is None:
        raise SourceError("the values of a GGUF tensor cannot be read here")
    return tensor.file
