"""Encoder: text -> (n, dim) unit vectors; wrappers and helpers of its implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (texts done, texts in all) while encoding."""


class Encoder(Protocol):
    """Text to unit vectors, batch-first and deterministic."""

    @property
    def name(self) -> str:
        """The name that `build_encoder` takes."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def digest(self) -> str:
        """`sha256:...` of everything that the vectors depend on: equal digests give equal vectors."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens that a text is truncated to; `None` where texts of any length are read whole."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        ...

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`, so that their end is not read."""
        ...


class WrappedEncoder:
    """Everything of a wrapped encoder but `encode`, which subclasses add."""

    def __init__(self, inner: Encoder) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """The inner encoder's name."""
        return self.inner.name

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.inner.dim

    @property
    def digest(self) -> str:
        """The inner encoder's digest."""
        return self.inner.digest

    @property
    def max_tokens(self) -> int | None:
        """The inner encoder's limit."""
        return self.inner.max_tokens

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`."""
        return self.inner.truncated(texts)


def valid_texts(texts: Sequence[str]) -> list[str]:
    """The texts without lone surrogates, which JSON may contain and tokenizers reject."""
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
