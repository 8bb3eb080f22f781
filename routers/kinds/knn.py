"""KNNRouter: the mean score of the most similar training queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import RouterError
from routers.fitted import EmbeddingRouter
from routers.numeric.neighbours import Vectors, mean_of_rows, quantiles, self_distances, share_nearer, top_k
from routers.outcomes.training_rows import TrainingRows
from routers.settings import check_choice, check_range

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

Weights = Literal["uniform", "distance"]
NEIGHBOURS = 100
"""Neighbours by default, where the training queries are at least twice as many."""
NEAREST = 1e-6
"""Lower bound of distances: an identical training query outweighs the others without a division by zero."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KNNSettings:
    """Settings of `KNNRouter`.

    Attributes:
        k: number of neighbours; `None` takes 100, or half of the training queries where those are fewer.
        weights: `uniform`, or `distance`: a neighbour weighs 1 / its cosine distance.
    """

    k: int | None = None
    weights: Weights = "uniform"

    def __post_init__(self) -> None:
        check_range(self, "k", low=1)
        check_choice(self, "weights", get_args(Weights))

    def neighbours(self, n: int) -> int:
        """Number of neighbours among n training queries."""
        return max(1, min(NEIGHBOURS, n // 2)) if self.k is None else self.k


@dataclass(frozen=True, slots=True, eq=False)
class KNNModel:
    """N training queries, m experts. The rows are kept so that `coe router update` learns more without encoding again.

    Attributes:
        vectors: (N, dim) embeddings.
        distance_quantiles: distances of training queries to their nearest other one.
    """

    rows: TrainingRows
    vectors: Vectors
    distance_quantiles: _Floats

    @classmethod
    def of(cls, rows: TrainingRows, vectors: Vectors, k: int | None) -> Self:
        """From the rows and (N, dim) embeddings of their prompts; raises RouterError where N < k."""
        if k is not None and len(rows) < k:
            raise RouterError(f"k={k} neighbours asked of {len(rows)} training queries: lower k or add queries")
        return cls(rows, vectors, quantiles(self_distances(vectors)))

    @property
    def experts(self) -> tuple[str, ...]:
        """m names."""
        return self.rows.experts

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.vectors.shape[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Embeddings, scores and costs."""
        return {"vectors": self.vectors, "distance_quantiles": self.distance_quantiles, **self.rows.arrays()}

    def values(self) -> dict[str, Any]:
        """Experts and domains."""
        return self.rows.settings()

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: KNNSettings) -> Self:
        """Rebuilds the model from what `arrays()` and `values()` returned."""
        return cls(TrainingRows.restored(arrays, values), arrays["vectors"], arrays["distance_quantiles"])


class KNNRouter(EmbeddingRouter[KNNSettings, KNNModel]):
    """The mean score of the k nearest training queries, by exact cosine similarity.

    The baseline that most learned routers only match (arXiv 2505.12601). `quality` and `cost_usd` are weighted means
    over the neighbours; `ood` is the share of training queries whose nearest neighbour is closer than this query's; the
    confidence of a decision is the quality of its expert.
    """

    kind: ClassVar[str] = "knn"
    Settings = KNNSettings
    Model = KNNModel

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table; raises RouterError before `fit`."""
        return self.model.rows

    def fit(self, table: OutcomeTable) -> Self:
        """Keep the embeddings, scores and costs of n queries.

        Raises:
            RouterError: fewer rows than the `k` that was set, or embeddings that are not finite.
        """
        self._model = KNNModel.of(TrainingRows.of(table), embed(self.encoder, table.prompts), self.settings.k)
        return self

    def extended(self, table: OutcomeTable) -> Self:
        """A router with n further rows, equal to one fitted on all rows. Only the new prompts are encoded."""
        vectors = np.vstack([self.model.vectors, embed(self.encoder, table.prompts)])
        return self.with_model(KNNModel.of(self.rows.joined(TrainingRows.of(table)), vectors, self.settings.k))

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router with other outcomes of the same queries, equal to one fitted on them. Nothing is encoded."""
        return self.with_model(KNNModel.of(rows, self.model.vectors, self.settings.k))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Mean score and cost of each of the m experts on the neighbours of each of the n queries."""
        model = self.model
        vectors, truncated = read_queries(self.encoder, queries)
        similarities, near = top_k(vectors, model.vectors, self.settings.neighbours(len(model.vectors)))
        shares = self._shares(similarities)
        return Estimate(
            experts=model.experts,
            quality=mean_of_rows(model.rows.scores, near, shares).clip(0.0, 1.0),
            cost_usd=None if model.rows.costs is None else mean_of_rows(model.rows.costs, near, shares),
            ood=share_nearer(1.0 - similarities[:, 0], model.distance_quantiles),
            truncated=truncated,
        )

    def _shares(self, similarities: Vectors) -> _Floats:
        """(n, k) weights; each row sums to 1."""
        if self.settings.weights == "uniform":
            return np.full(similarities.shape, 1.0 / similarities.shape[1])
        closeness = 1.0 / np.maximum(1.0 - similarities.astype(np.float64), NEAREST)
        return np.asarray(closeness / closeness.sum(axis=1, keepdims=True))
