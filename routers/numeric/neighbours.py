"""Exact nearest neighbours by cosine, in numpy. Vectors have length 1, so a dot product is a cosine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 256
"""Queries compared with the training rows at once: bounds memory to CHUNK_ROWS * N similarities."""
QUANTILES = 101
"""Points of a stored distribution of distances."""
SAMPLE_ROWS = 2000
"""Most training rows that `self_distances` reads."""

Vectors = NDArray[np.float32]


def top_k(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, NDArray[np.intp]]:
    """(n, k) similarities and (n, k) rows of `vectors` (N, dim), most similar first; k <= N."""
    similarities = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.intp)
    for part, block in _similarity_blocks(queries, vectors):
        found = np.argpartition(-block, k - 1, axis=1)[:, :k]
        found.sort(axis=1)  # then a stable sort by similarity gives ties to the earlier row
        near = np.take_along_axis(block, found, axis=1)
        order = np.argsort(-near, axis=1, kind="stable")
        rows[part] = np.take_along_axis(found, order, axis=1)
        similarities[part] = np.take_along_axis(near, order, axis=1)
    return similarities, rows


def mean_of_rows(values: NDArray[np.float64], rows: NDArray[np.intp], shares: NDArray[np.float64]) -> Any:
    """(n, m) means of (N, m) values over (n, k) rows with (n, k) shares that sum to 1."""
    means = np.empty((len(rows), values.shape[1]))
    for start in range(0, len(rows), CHUNK_ROWS):  # bounds memory to CHUNK_ROWS * k * m numbers
        part = slice(start, start + CHUNK_ROWS)
        means[part] = np.einsum("nk,nkm->nm", shares[part], values[rows[part]])
    return means


def nearest_distance(queries: Vectors, vectors: Vectors) -> NDArray[np.float64]:
    """(n,) cosine distance, in [0, 2], of each query to the nearest of `vectors`."""
    distances = np.empty(len(queries))
    for part, block in _similarity_blocks(queries, vectors):
        distances[part] = 1.0 - block.max(axis=1)
    return distances.clip(0.0, 2.0)


def self_distances(vectors: Vectors) -> NDArray[np.float64]:
    """Distance of training rows, at most `SAMPLE_ROWS` of them evenly spaced, to their nearest other row."""
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), SAMPLE_ROWS)).astype(np.intp))
    distances = np.empty(len(rows))
    for part, block in _similarity_blocks(vectors[rows], vectors):
        block[np.arange(len(block)), rows[part]] = -1.0
        distances[part] = 1.0 - block.max(axis=1)
    return distances.clip(0.0, 2.0)


def quantiles(distances: NDArray[Any]) -> NDArray[np.float64]:
    """(QUANTILES,) the distribution of distances, as its evenly spaced quantiles."""
    return np.asarray(np.quantile(distances, np.linspace(0, 1, QUANTILES)), dtype=np.float64)


def share_nearer(distances: NDArray[Any], known: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) share, in [0, 1], of a distribution (as its `quantiles`) that lies nearer than each distance."""
    return np.searchsorted(known, distances, side="left") / len(known)


def _similarity_blocks(queries: Vectors, vectors: Vectors) -> Iterator[tuple[slice, Vectors]]:
    for start in range(0, len(queries), CHUNK_ROWS):
        part = slice(start, min(start + CHUNK_ROWS, len(queries)))
        yield part, queries[part] @ vectors.T
