"""Texts to checked embeddings: the interface between a router and its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from routers.encoders.base import WrappedEncoder
from routers.errors import InvalidArtifact, RouterError

if TYPE_CHECKING:
    from routers.base import Query
    from routers.encoders.build import Encoder


def embed(encoder: Encoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """(n, dim) float32 rows of length 1, the encoder's embeddings of the texts.

    Raises:
        RouterError: the encoder gave another shape than it states, or a value that is not finite.
    """
    vectors = np.asarray(encoder.encode(texts), dtype=np.float32)
    if vectors.shape != (len(texts), encoder.dim):
        raise RouterError(
            f"encoder {encoder.name} gave an array of shape {vectors.shape}, expected {(len(texts), encoder.dim)}"
        )
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise RouterError(
            f"encoder {encoder.name} gave NaN or infinite embeddings for {len(broken)} of {len(texts)} texts, "
            f"the first of them text {broken[0] + 1}: {texts[broken[0]][:60]!r}"
        )
    return vectors


def read_queries(encoder: Encoder, queries: Sequence[Query]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(n, dim) embeddings of the last user messages, and (n,) whether each is truncated."""
    texts = [query.text for query in queries]
    return embed(encoder, texts), encoder.truncated(texts)


class LastBatch(WrappedEncoder):
    """An encoder that caches its last batch, for routers whose parts read the same queries in turn."""

    def __init__(self, inner: Encoder) -> None:
        super().__init__(inner)
        self._last: tuple[list[str], NDArray[np.float32]] | None = None  # replaced whole: threads may share it

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, every row of length 1."""
        last = self._last
        if last is not None and last[0] == list(texts):
            return last[1]
        vectors = self.inner.encode(texts)
        self._last = (list(texts), vectors)
        return vectors


def check_dim(encoder: Encoder, dim: int, kind: str) -> None:
    """Refuse a saved router that was trained on embeddings of `dim` dimensions with an encoder of another width.

    Raises:
        InvalidArtifact: the encoder gives another number of dimensions.
    """
    if dim != encoder.dim:
        raise InvalidArtifact(
            f"this {kind} router was trained on embeddings of {dim} dimensions, but encoder "
            f"{encoder.name} gives {encoder.dim}: load it with the encoder it was trained with"
        )
