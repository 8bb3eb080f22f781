"""An encoder that caches the vectors of a table, for routers that are trained on several parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from routers.encoders.base import Encoder, Vectors, WrappedEncoder
from routers.encoders.embed import embed


class Remembered(WrappedEncoder):
    """Vectors of n texts, computed on first use; other texts go to the inner encoder.

    Args:
        inner: encoder of the texts.
        texts: to cache.
    """

    def __init__(self, inner: Encoder, texts: Sequence[str]) -> None:
        super().__init__(inner)
        self._texts = list(dict.fromkeys(texts))
        self._row_of = {text: row for row, text in enumerate(self._texts)}

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        if any(text not in self._row_of for text in texts):
            return self.inner.encode(texts)
        return self._vectors[[self._row_of[text] for text in texts]]

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`."""
        if any(text not in self._row_of for text in texts):
            return self.inner.truncated(texts)
        return self._truncated[[self._row_of[text] for text in texts]]

    @cached_property
    def _vectors(self) -> Vectors:
        return embed(self.inner, self._texts)

    @cached_property
    def _truncated(self) -> NDArray[np.bool_]:
        return self.inner.truncated(self._texts)
