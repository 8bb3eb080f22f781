"""ClusterRouter: k-means clusters of the training queries, and how well each expert does in them (Avengers)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.encoders.embed import check_dim, embed, read_queries
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.numeric.kmeans import kmeans
from routers.numeric.neighbours import Vectors, foreignness, quantiles, top_k
from routers.numeric.shrinkage import one_hot, shrunk_means
from routers.outcomes.training_rows import TrainingRows

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

Score = Literal["mean", "rank", "mix"]
RANK_OFFSET = 0.1
"""Keeps the best rank, 0, from dividing by zero, and decides how much more it counts than the second."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Clusters:
    """C clusters of N training queries, m experts."""

    rows: TrainingRows
    centres: Vectors  # (C, dim), of length 1
    cluster_of: NDArray[np.intp]  # (N,)
    distances: _Floats  # (N,) of each training query to its centre

    @classmethod
    def of(cls, rows: TrainingRows, vectors: Vectors, centres: Vectors) -> Self:
        return cls(rows, centres, *_assigned(vectors, centres))

    def joined(self, rows: TrainingRows, vectors: Vectors) -> _Clusters:
        """The same clusters with further queries in them."""
        more = _Clusters.of(rows, vectors, self.centres)
        return _Clusters(
            self.rows.joined(rows),
            self.centres,
            np.concatenate([self.cluster_of, more.cluster_of]),
            np.concatenate([self.distances, more.distances]),
        )

    def means(self, values: _Floats, shrinkage: float) -> _Floats:
        """(C, m) means of (N, m) values."""
        return shrunk_means(values, one_hot(self.cluster_of, len(self.centres)), shrinkage)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """What the estimate is computed from: (C, m) each, and the distribution of distances."""

    accuracy: _Floats
    costs: _Floats | None
    preference: _Floats | None  # what the choice follows; `None` where that is the accuracy
    distance_quantiles: _Floats


class ClusterRouter:
    """k-means clusters of the queries; an expert is as good on a query as it was in the clusters near it.

    From Avengers (arXiv 2505.19797): unit embeddings, k-means with 64 centres c, for a query q the nearest centres by
    d_c = 1 - c.q, their weights p = softmax(-beta d) with beta = 6, and the rank score sum_c p_c / (rank_mc + 0.1),
    rank 0 being the expert of highest accuracy in c. From Avengers-Pro (arXiv 2508.12631): of each cluster the mix
    (1 - w) (acc - min) / (max - min) + w (1 - cost / max cost), summed in the same way. Ours: centres of length 1,
    accuracies shrunk towards the table's, experts of equal accuracy share the better rank, and `quality`, which is the
    expected accuracy sum_c p_c acc_mc whatever the choice follows, so that confidences and cost weights keep their
    meaning.

    With `score="mean"` the choice is by that quality and every expert is eligible. With `rank` and `mix` the `top_n`
    experts of highest score are eligible: with 1 the choice is the paper's own; with more, `decide` takes of these the
    one of highest utility, or all of them where k are asked for (the paper's top_n, which then vote).

    Args:
        n_clusters: centres; fewer where there are fewer different prompts.
        nearest: centres that a query looks at.
        beta: how much more the nearest of them counts.
        shrinkage: the accuracies and costs of a cluster are averaged with so many queries of the table's mean.
        score: what the choice follows: `mean`, `rank` or `mix`.
        top_n: how many experts `rank` and `mix` let answer.
        cost_weight: the mix's w in [0, 1].
        seed: of the k-means.
    """

    kind: ClassVar[str] = "cluster"
    requires: frozenset[str] = frozenset()

    def __init__(
        self,
        encoder: Encoder,
        *,
        n_clusters: int = 64,
        nearest: int = 5,
        beta: float = 6.0,
        shrinkage: float = 20.0,
        score: Score = "mean",
        top_n: int = 1,
        cost_weight: float = 0.3,
        seed: int = 0,
    ) -> None:
        for name, count in (("n_clusters", n_clusters), ("nearest", nearest), ("top_n", top_n)):
            if count < 1:
                raise InvalidSettings(f"{name} must be at least 1, got {count}")
        for name, value in (("beta", beta), ("shrinkage", shrinkage)):
            if not (np.isfinite(value) and value >= 0):
                raise InvalidSettings(f"{name} must be a finite number >= 0, got {value}")
        if score not in get_args(Score):
            raise InvalidSettings(f"score must be one of {', '.join(get_args(Score))}, got {score!r}")
        if not 0 <= cost_weight <= 1:
            raise InvalidSettings(f"cost_weight must lie in [0, 1], got {cost_weight}")
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.nearest = nearest
        self.beta = beta
        self.shrinkage = shrinkage
        self.score: Score = score
        self.top_n = top_n
        self.cost_weight = cost_weight
        self.seed = seed
        self._clusters: _Clusters | None = None
        self._table: _Table | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return () if self._clusters is None else self._clusters.rows.experts

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table.

        Raises:
            RouterError: it is not trained yet.
        """
        return self._trained()[0].rows

    def fit(self, table: OutcomeTable) -> Self:
        """Find clusters of n prompts, and the experts' scores and costs in them.

        Raises:
            RouterError: fewer rows than clusters, a mix without costs, or embeddings that are not finite.
        """
        self._check_costs(table.costs_usd)
        vectors = embed(self.encoder, table.prompts)
        centres = kmeans(vectors, self.n_clusters, self.seed)
        return self._learn(_Clusters.of(TrainingRows.of(table), vectors, centres))

    def extended(self, table: OutcomeTable) -> Self:
        """A router that has also seen the n rows of a table, in the same clusters. Encodes only the new."""
        clusters = self._trained()[0].joined(TrainingRows.of(table), embed(self.encoder, table.prompts))
        return self._untrained()._learn(clusters)

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router that knows other outcomes of the same queries; equal to one fitted on them. Encodes nothing."""
        clusters = self._trained()[0]
        return self._untrained()._learn(_Clusters(rows, clusters.centres, clusters.cluster_of, clusters.distances))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each of the m experts scored and cost in the clusters near each of the n queries."""
        clusters, table = self._trained()
        vectors, truncated = read_queries(self.encoder, queries)
        similarities, near = top_k(vectors, clusters.centres, min(self.nearest, len(clusters.centres)))
        shares = self._shares(similarities)

        def mixed(values: _Floats) -> _Floats:
            return np.asarray(np.einsum("nc,ncm->nm", shares, values[near]))

        return Estimate(
            experts=clusters.rows.experts,
            quality=mixed(table.accuracy).clip(0.0, 1.0),
            cost_usd=None if table.costs is None else mixed(table.costs),
            ood=foreignness(1.0 - similarities[:, 0].astype(np.float64), table.distance_quantiles),
            labels=tuple(f"cluster-{cluster:03d}" for cluster in near[:, 0]),
            eligible=None if table.preference is None else self._best(mixed(table.preference)),
            truncated=truncated,
        )

    def state(self) -> RouterState:
        """The trained router as data: centres, and the training queries' clusters, scores and costs; no prompts."""
        clusters, _ = self._trained()
        arrays: dict[str, NDArray[Any]] = {
            "centres": clusters.centres,
            "cluster_of": clusters.cluster_of,
            "distances": clusters.distances,
            **clusters.rows.arrays(),
        }
        return RouterState(arrays, {"settings": self._settings(), **clusters.rows.settings()})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        arrays = state.arrays
        try:
            rows = TrainingRows.restored(arrays, state.settings)
            clusters = _Clusters(rows, arrays["centres"], arrays["cluster_of"], arrays["distances"])
            router = cls(encoder, **state.settings["settings"])._learn(clusters)
        except KeyError as error:
            raise InvalidArtifact(f"the saved cluster router lacks {error}: train it again") from error
        check_dim(encoder, clusters.centres, cls.kind)
        return router

    def _settings(self) -> dict[str, Any]:
        return {
            "n_clusters": self.n_clusters,
            "nearest": self.nearest,
            "beta": self.beta,
            "shrinkage": self.shrinkage,
            "score": self.score,
            "top_n": self.top_n,
            "cost_weight": self.cost_weight,
            "seed": self.seed,
        }

    def _untrained(self) -> Self:
        return type(self)(self.encoder, **self._settings())

    def _learn(self, clusters: _Clusters) -> Self:
        rows = clusters.rows
        self._check_costs(rows.costs)
        accuracy = clusters.means(rows.scores, self.shrinkage)
        costs = None if rows.costs is None else clusters.means(rows.costs, self.shrinkage)
        preference = None
        if self.score == "rank":
            preference = rank_scores(accuracy)
        elif self.score == "mix" and costs is not None:
            preference = quality_cost_mix(accuracy, costs, self.cost_weight)
        self._clusters = clusters
        self._table = _Table(accuracy, costs, preference, quantiles(clusters.distances))
        return self

    def _check_costs(self, costs: _Floats | None) -> None:
        if self.score == "mix" and costs is None:
            raise RouterError(
                "score 'mix' weighs quality against cost, but the table knows no costs: add cost columns or prices, or "
                "take score 'mean' or 'rank'"
            )

    def _trained(self) -> tuple[_Clusters, _Table]:
        if self._clusters is None or self._table is None:
            raise RouterError("this cluster router is not trained: call fit(table), or load a saved one")
        return self._clusters, self._table

    def _shares(self, similarities: Vectors) -> _Floats:
        """(n, nearest) softmax(-beta d), by columns of falling similarity."""
        distances = 1.0 - similarities.astype(np.float64)
        weights = np.exp(-self.beta * (distances - distances[:, :1]))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def _best(self, preference: _Floats) -> NDArray[np.bool_]:
        """(n, m) bool: the `top_n` of highest preference, and who equals the last of them."""
        last = np.sort(preference, axis=1)[:, -min(self.top_n, preference.shape[1])]
        return np.asarray(preference >= last[:, None] - 1e-12, dtype=bool)


def rank_scores(accuracy: _Floats) -> _Floats:
    """(C, m) 1 / (rank + 0.1) of (C, m) accuracies; the rank of an expert is how many are better in its cluster."""
    rank = (accuracy[:, None, :] > accuracy[:, :, None]).sum(axis=2)
    return np.asarray(1.0 / (rank + RANK_OFFSET))


def quality_cost_mix(accuracy: _Floats, costs: _Floats, cost_weight: float) -> _Floats:
    """(C, m) (1 - w) (acc - min) / (max - min) + w (1 - cost / max cost), minima and maxima over a cluster's experts.

    Where all are equally good the first term is 1, where all are free the second.
    """
    low, high = accuracy.min(axis=1, keepdims=True), accuracy.max(axis=1, keepdims=True)
    spread, dearest = high - low, costs.max(axis=1, keepdims=True)
    quality = np.where(spread > 0, (accuracy - low) / np.where(spread > 0, spread, 1.0), 1.0)
    cheapness = 1.0 - costs / np.where(dearest > 0, dearest, 1.0)
    return np.asarray((1 - cost_weight) * quality + cost_weight * cheapness)


def _assigned(vectors: Vectors, centres: Vectors) -> tuple[NDArray[np.intp], _Floats]:
    """(n,) the nearest centre of each vector, and how far it is."""
    similarities, rows = top_k(vectors, centres, 1)
    return rows[:, 0], 1.0 - similarities[:, 0].astype(np.float64)
