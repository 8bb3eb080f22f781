"""KNNRouter: an expert is as good on a query as it was on the most similar training queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.encoders.embed import check_dim, embed, read_queries
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.numeric.neighbours import Vectors, foreignness, quantiles, self_distances, top_k
from routers.outcomes.training_rows import TrainingRows

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

Weights = Literal["uniform", "distance"]
NEAREST = 1e-6
"""Distances are floored at this, so that an identical training query outweighs others without dividing by zero."""
ROWS_AT_ONCE = 256
"""Queries whose neighbours' scores are gathered at once: bounds memory to ROWS_AT_ONCE * k * m numbers."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """N training queries, m experts."""

    rows: TrainingRows
    vectors: Vectors  # (N, dim)
    distance_quantiles: _Floats  # of training queries to their nearest other


class KNNRouter:
    """The mean score of the k nearest training queries, by exact cosine similarity.

    The baseline that most learned routers only match (arXiv 2505.12601). `quality` and `cost_usd` are weighted means
    over the neighbours; `ood` is the share of training queries that lie nearer to another training query than this
    query does; the confidence of a decision is the quality of its expert.

    Args:
        k: neighbours.
        weights: `uniform`, or `distance`: each neighbour weighs 1 / its cosine distance.
    """

    kind: ClassVar[str] = "knn"
    requires: frozenset[str] = frozenset()

    def __init__(self, encoder: Encoder, *, k: int = 100, weights: Weights = "uniform") -> None:
        if k < 1:
            raise InvalidSettings(f"k must be at least 1, got {k}")
        if weights not in ("uniform", "distance"):
            raise InvalidSettings(f"weights must be 'uniform' or 'distance', got {weights!r}")
        self.encoder = encoder
        self.k = k
        self.weights = weights
        self._memory: _Memory | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return () if self._memory is None else self._memory.rows.experts

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table.

        Raises:
            RouterError: it is not trained yet.
        """
        return self._trained().rows

    def fit(self, table: OutcomeTable) -> Self:
        """Remember n prompts with their scores and costs.

        Raises:
            RouterError: fewer rows than neighbours, or embeddings that are not finite.
        """
        return self._remember(TrainingRows.of(table), embed(self.encoder, table.prompts))

    def extended(self, table: OutcomeTable) -> Self:
        """A router that has also seen the n rows of a table; equal to one fitted on all rows. Encodes only the new."""
        memory = self._trained()
        vectors = np.vstack([memory.vectors, embed(self.encoder, table.prompts)])
        return self._untrained()._remember(memory.rows.joined(TrainingRows.of(table)), vectors)

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router that knows other outcomes of the same queries; equal to one fitted on them. Encodes nothing."""
        return self._untrained()._remember(rows, self._trained().vectors)

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each of the m experts scored and cost near each of the n queries."""
        memory = self._trained()
        vectors, truncated = read_queries(self.encoder, queries)
        similarities, rows = top_k(vectors, memory.vectors, self.k)
        shares = self._shares(similarities)
        return Estimate(
            experts=memory.rows.experts,
            quality=_mean_of_neighbours(memory.rows.scores, rows, shares).clip(0.0, 1.0),
            cost_usd=None if memory.rows.costs is None else _mean_of_neighbours(memory.rows.costs, rows, shares),
            ood=foreignness(1.0 - similarities[:, 0], memory.distance_quantiles),
            truncated=truncated,
        )

    def state(self) -> RouterState:
        """The trained router as data: embeddings, scores and costs; no prompts."""
        memory = self._trained()
        arrays: dict[str, NDArray[Any]] = {"vectors": memory.vectors, "distance_quantiles": memory.distance_quantiles}
        return RouterState({**arrays, **memory.rows.arrays()}, {"settings": self._settings(), **memory.rows.settings()})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        arrays = state.arrays
        try:
            router = cls(encoder, **state.settings["settings"])
            rows = TrainingRows.restored(arrays, state.settings)
            router._memory = _Memory(rows, arrays["vectors"], arrays["distance_quantiles"])
        except KeyError as error:
            raise InvalidArtifact(f"the saved knn router lacks {error}: train it again") from error
        check_dim(encoder, router._memory.vectors, cls.kind)
        return router

    def _settings(self) -> dict[str, Any]:
        return {"k": self.k, "weights": self.weights}

    def _untrained(self) -> Self:
        return type(self)(self.encoder, **self._settings())

    def _remember(self, rows: TrainingRows, vectors: Vectors) -> Self:
        if len(rows) < self.k:
            raise RouterError(f"k={self.k} neighbours asked of {len(rows)} training queries: lower k or add queries")
        self._memory = _Memory(rows, vectors, quantiles(self_distances(vectors)))
        return self

    def _trained(self) -> _Memory:
        if self._memory is None:
            raise RouterError("this knn router is not trained: call fit(table), or load a saved one")
        return self._memory

    def _shares(self, similarities: Vectors) -> _Floats:
        """(n, k) weights that sum to 1 for each query."""
        if self.weights == "uniform":
            return np.full(similarities.shape, 1.0 / self.k)
        closeness = 1.0 / np.maximum(1.0 - similarities.astype(np.float64), NEAREST)
        return np.asarray(closeness / closeness.sum(axis=1, keepdims=True))


def _mean_of_neighbours(values: _Floats, rows: NDArray[np.intp], shares: _Floats) -> _Floats:
    """(n, m) means of (N, m) values over (n, k) rows."""
    means = np.empty((len(rows), values.shape[1]))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        means[part] = np.einsum("nk,nkm->nm", shares[part], values[rows[part]])
    return means
