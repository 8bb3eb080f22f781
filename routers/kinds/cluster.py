"""ClusterRouter: k-means clusters of the training queries, and each expert's mean score in them (Avengers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import RouterError
from routers.fitted import EmbeddingRouter
from routers.numeric.kmeans import kmeans
from routers.numeric.neighbours import Vectors, mean_of_rows, quantiles, share_nearer, top_k
from routers.numeric.shrinkage import one_hot, shrunk_means
from routers.outcomes.training_rows import TrainingRows
from routers.settings import check_choice, check_range

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

Score = Literal["mean", "rank", "mix"]
CLUSTERS = 64
"""Clusters by default, where there are enough training queries."""
LEAST_MEMBERS = 5
"""Training queries per cluster, on average, that the default number of clusters keeps."""
RANK_OFFSET = 0.1
"""Keeps the best rank, 0, from dividing by zero, and sets how much more it counts than the second."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Settings of `ClusterRouter`.

    Attributes:
        n_clusters: number of centres, fewer where there are fewer different prompts; `None` takes 64, or as many as
            leave five training queries to a cluster.
        nearest: number of centres that a query is compared with.
        beta: inverse temperature of their weights: the larger, the more the nearest centre counts.
        shrinkage: accuracies and costs of a cluster shrink to the table's means with the weight of this many queries.
        score: what the choice follows: `mean`, `rank` or `mix`.
        top_n: number of experts that `rank` and `mix` make eligible.
        cost_weight: weight w of the cost in `mix`, in [0, 1].
        seed: seed of k-means.
    """

    n_clusters: int | None = None
    nearest: int = 5
    beta: float = 6.0
    shrinkage: float = 20.0
    score: Score = "mean"
    top_n: int = 1
    cost_weight: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "n_clusters", "nearest", "top_n", low=1)
        check_range(self, "beta", "shrinkage")
        check_choice(self, "score", get_args(Score))
        check_range(self, "cost_weight", high=1)

    def clusters(self, n: int) -> int:
        """Number of centres for n training queries."""
        return max(1, min(CLUSTERS, n // LEAST_MEMBERS)) if self.n_clusters is None else self.n_clusters


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """C clusters of N training queries, m experts.

    Attributes:
        centres: (C, dim), of length 1.
        cluster_of: (N,) nearest centre of each training query; distances: (N,) cosine distance to it.
    """

    rows: TrainingRows
    centres: Vectors
    cluster_of: NDArray[np.intp]
    distances: _Floats

    @classmethod
    def of(cls, rows: TrainingRows, vectors: Vectors, centres: Vectors) -> Self:
        """Assign (N, dim) vectors to their nearest centres."""
        similarities, nearest = top_k(vectors, centres, 1)
        return cls(rows, centres, nearest[:, 0], 1.0 - similarities[:, 0].astype(np.float64))

    def joined(self, rows: TrainingRows, vectors: Vectors) -> Clusters:
        """The same clusters with further queries in them."""
        more = Clusters.of(rows, vectors, self.centres)
        return Clusters(
            self.rows.joined(rows),
            self.centres,
            np.concatenate([self.cluster_of, more.cluster_of]),
            np.concatenate([self.distances, more.distances]),
        )

    def means(self, values: _Floats, shrinkage: float) -> _Floats:
        """(C, m) means of (N, m) values."""
        return shrunk_means(values, one_hot(self.cluster_of, len(self.centres)), shrinkage)


@dataclass(frozen=True, slots=True, eq=False)
class ClusterModel:
    """What the estimate is computed from.

    Attributes:
        accuracy, costs: (C, m) mean scores and USD; costs are `None` where unknown.
        preference: (C, m) what the choice follows; `None` where that is the accuracy.
        distance_quantiles: distances of the training queries to their centres.
    """

    clusters: Clusters
    accuracy: _Floats
    costs: _Floats | None
    preference: _Floats | None
    distance_quantiles: _Floats

    @classmethod
    def of(cls, clusters: Clusters, settings: ClusterSettings) -> Self:
        """Average the scores and costs of each cluster; raises RouterError for a mix without costs."""
        rows, preference = clusters.rows, None
        check_costs(settings, rows.costs)
        accuracy = clusters.means(rows.scores, settings.shrinkage)
        costs = None if rows.costs is None else clusters.means(rows.costs, settings.shrinkage)
        if settings.score == "rank":
            preference = rank_scores(accuracy)
        elif settings.score == "mix" and costs is not None:
            preference = quality_cost_mix(accuracy, costs, settings.cost_weight)
        return cls(clusters, accuracy, costs, preference, quantiles(clusters.distances))

    @property
    def experts(self) -> tuple[str, ...]:
        """m names."""
        return self.clusters.rows.experts

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.clusters.centres.shape[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Centres, and cluster, distance, scores and costs of each training query."""
        found = self.clusters
        own = {name: getattr(found, name) for name in ("centres", "cluster_of", "distances")}
        return {**own, **found.rows.arrays()}

    def values(self) -> dict[str, Any]:
        """Experts and domains."""
        return self.clusters.rows.settings()

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: ClusterSettings) -> Self:
        """The model of `arrays()` and `values()`."""
        rows = TrainingRows.restored(arrays, values)
        return cls.of(Clusters(rows, arrays["centres"], arrays["cluster_of"], arrays["distances"]), settings)


class ClusterRouter(EmbeddingRouter[ClusterSettings, ClusterModel]):
    """k-means clusters of the queries; an expert's quality is its mean score in the clusters nearest to a query.

    From Avengers (arXiv 2505.19797): unit embeddings, k-means with 64 centres c, for a query q the nearest centres by
    d_c = 1 - c.q, their weights p = softmax(-beta d) with beta = 6, and the rank score sum_c p_c / (rank_mc + 0.1),
    rank 0 being the expert of highest accuracy in c. From Avengers-Pro (arXiv 2508.12631): of each cluster the mix
    (1 - w) (acc - min) / (max - min) + w (1 - cost / max cost), summed in the same way. Ours: centres of length 1,
    accuracies shrunk to the table's mean, a shared better rank for experts of equal accuracy, and `quality`, which is
    the expected accuracy sum_c p_c acc_mc whatever the choice follows, so that confidences and cost weights keep their
    meaning.

    With `score="mean"` the choice follows that quality and every expert is eligible. With `rank` and `mix` the `top_n`
    experts of highest score are eligible: 1 gives the paper's choice; with more, `decide` takes the one of highest
    utility, or several where k experts are asked for (the paper's top_n, which then vote).
    """

    kind: ClassVar[str] = "cluster"
    Settings = ClusterSettings
    Model = ClusterModel

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table; raises RouterError before `fit`."""
        return self.model.clusters.rows

    def fit(self, table: OutcomeTable) -> Self:
        """Cluster n prompts and average the experts' scores and costs in each cluster.

        Raises:
            RouterError: fewer rows than the `n_clusters` that were set, a mix without costs, or embeddings that are not
                finite.
        """
        check_costs(self.settings, table.costs_usd)
        vectors = embed(self.encoder, table.prompts)
        centres = kmeans(vectors, self.settings.clusters(len(table)), self.settings.seed)
        self._model = ClusterModel.of(Clusters.of(TrainingRows.of(table), vectors, centres), self.settings)
        return self

    def extended(self, table: OutcomeTable) -> Self:
        """A router with n further rows in the same clusters. Only the new prompts are encoded."""
        more = self.model.clusters.joined(TrainingRows.of(table), embed(self.encoder, table.prompts))
        return self.with_model(ClusterModel.of(more, self.settings))

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router with other outcomes of the same queries, equal to one fitted on them. Nothing is encoded."""
        return self.with_model(ClusterModel.of(replace(self.model.clusters, rows=rows), self.settings))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Mean score and cost of each of the m experts in the clusters nearest to each of the n queries."""
        model = self.model
        centres = model.clusters.centres
        vectors, truncated = read_queries(self.encoder, queries)
        similarities, near = top_k(vectors, centres, min(self.settings.nearest, len(centres)))
        shares = self._shares(similarities)
        preference = None if model.preference is None else mean_of_rows(model.preference, near, shares)
        return Estimate(
            experts=model.experts,
            quality=mean_of_rows(model.accuracy, near, shares).clip(0.0, 1.0),
            cost_usd=None if model.costs is None else mean_of_rows(model.costs, near, shares),
            ood=share_nearer(1.0 - similarities[:, 0].astype(np.float64), model.distance_quantiles),
            labels=tuple(f"cluster-{cluster:03d}" for cluster in near[:, 0]),
            eligible=None if preference is None else self._best(preference),
            truncated=truncated,
        )

    def _shares(self, similarities: Vectors) -> _Floats:
        """(n, nearest) softmax(-beta d), by columns of falling similarity."""
        distances = 1.0 - similarities.astype(np.float64)
        weights = np.exp(-self.settings.beta * (distances - distances[:, :1]))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def _best(self, preference: _Floats) -> NDArray[np.bool_]:
        """(n, m) bool: the `top_n` of highest preference, and those equal to the last of them."""
        last = np.sort(preference, axis=1)[:, -min(self.settings.top_n, preference.shape[1])]
        return np.asarray(preference >= last[:, None] - 1e-12, dtype=bool)


def check_costs(settings: ClusterSettings, costs: _Floats | None) -> None:
    """Refuse `score="mix"` where costs are unknown.

    Raises:
        RouterError: what to do.
    """
    if settings.score == "mix" and costs is None:
        raise RouterError(
            "score 'mix' weighs quality against cost, but the table knows no costs: add cost columns or prices, or "
            "take score 'mean' or 'rank'"
        )


def rank_scores(accuracy: _Floats) -> _Floats:
    """(C, m) 1 / (rank + 0.1) of (C, m) accuracies; the rank of an expert is how many are better in its cluster."""
    rank = (accuracy[:, None, :] > accuracy[:, :, None]).sum(axis=2)
    return np.asarray(1.0 / (rank + RANK_OFFSET))


def quality_cost_mix(accuracy: _Floats, costs: _Floats, cost_weight: float) -> _Floats:
    """(C, m) (1 - w) (acc - min) / (max - min) + w (1 - cost / max cost), minima and maxima over a cluster's experts.

    The first term is 1 where all experts are equally good, the second where all are free.
    """
    low, high = accuracy.min(axis=1, keepdims=True), accuracy.max(axis=1, keepdims=True)
    spread, dearest = high - low, costs.max(axis=1, keepdims=True)
    quality = np.where(spread > 0, (accuracy - low) / np.where(spread > 0, spread, 1.0), 1.0)
    cheapness = 1.0 - costs / np.where(dearest > 0, dearest, 1.0)
    return np.asarray((1 - cost_weight) * quality + cost_weight * cheapness)
