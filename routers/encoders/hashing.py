"""HashingEncoder: words and character n-grams, no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.encoders.base import Vectors, valid_texts
from routers.errors import InvalidEncoder


class HashingEncoder:
    """Hashed words and character n-grams: no weights, equal in every process. For tests and small machines.

    Half of the `dim` positions count words, half count n-grams of 3 to 5 characters inside words. A text without
    either is encoded as the first unit vector.
    """

    max_tokens = None

    def __init__(self, dim: int = 512) -> None:
        if dim < 2:
            raise InvalidEncoder(f"a hashing encoder needs at least 2 dimensions, got {dim}")
        self.dim = dim
        self.name = f"hashing:{dim}"
        self.digest = f"sha256:{hashlib.sha256(f'hashing-1:{dim}'.encode()).hexdigest()}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        valid = valid_texts(texts)
        both = np.hstack([_unit(hasher.transform(map(split, valid)).toarray()) for split, hasher in self._halves])
        both[~both.any(axis=1), 0] = 1.0
        return np.asarray(both / np.linalg.norm(both, axis=1, keepdims=True), dtype=np.float32)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """All False: texts are read whole."""
        return np.zeros(len(texts), dtype=bool)

    @cached_property
    def _halves(self) -> tuple[tuple[Callable[[str], list[str]], Any], ...]:
        """Analyzers and hashers of words and of n-grams.

        A HashingVectorizer does both but takes four times as long for a single text, because of its checks.
        """
        from sklearn.feature_extraction import FeatureHasher
        from sklearn.feature_extraction.text import HashingVectorizer

        half = self.dim // 2
        words = HashingVectorizer(token_pattern=r"\w+").build_analyzer()
        grams = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5)).build_analyzer()
        return (
            (words, FeatureHasher(half, input_type="string")),
            (grams, FeatureHasher(self.dim - half, input_type="string")),
        )


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every row divided by its length; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths, lengths, 1.0), dtype=np.float64)
