"""CategoryRouter: Composition of Experts (arXiv 2412.01868), a category classifier and a category -> expert map."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self, get_args

import numpy as np

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import InvalidSettings
from routers.fitted import EmbeddingRouter
from routers.kinds.category.budget import footprints_of, generalist, kept_by
from routers.kinds.category.mapping import Budget, BudgetKind, map_categories
from routers.kinds.category.model import CategoryModel, ExpertChoice, TrainingData, choose
from routers.numeric.abstention import Doubt, Thresholds, normalised_entropy, tune_thresholds
from routers.numeric.classifiers import (
    Classifier,
    ClassifierName,
    ClassifierSettings,
    Labels,
    fit_classifier,
    probabilities,
)
from routers.numeric.cross_fit import cross_fit, left_out_categories
from routers.numeric.kmeans import kmeans
from routers.numeric.neighbours import Vectors, nearest_distance, quantiles, top_k
from routers.numeric.shrinkage import shrunk_means
from routers.outcomes.training_rows import TrainingRows
from routers.settings import check_choice, check_range

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

NEIGHBOURS, CLUSTERS = 15, 16
"""Neighbours and clusters by default, where there are enough training queries."""
LEAST_MEMBERS = 5
"""Training queries per cluster, on average, that the default number of clusters keeps."""
CLUSTER_STARTS = 4
"""k-means initialisations where the categories are clusters: they are few, so that a bad start matters."""


@dataclass(frozen=True, slots=True)
class CategorySettings:
    """Settings of `CategoryRouter`.

    Attributes:
        classifier: `logistic`, `linear-svm` or `knn`.
        c: inverse regularisation of the first two; k: neighbours of the last, `None` takes 15 or all training queries
            where those are fewer.
        label_column: the table's column of categories when training; `None` takes its domains, or without domains
            k-means clusters of the embeddings, `n_clusters` of them. A query's own label is never read.
        n_clusters: `None` takes 16, or as many as leave five training queries to a cluster.
        shrinkage: the scores of a category shrink to the table's mean with the weight of this many queries.
        choice: `category` takes the expert of the likeliest category; `expected` the one of highest expected score
            among all in the map. `None` takes `category` under an average-active budget, which only the map keeps, else
            `expected`. `soft` leaves every expert eligible (of those that a cumulative budget keeps), so that k experts
            can be chosen and a cost weight has an effect; the confidence is then the best expert's quality, and a query
            that abstains still has the generalist alone.
        budget: largest footprint, `None` for no limit; budget_kind: `cumulative` or `average-active`.
        footprints: parameters or price of each expert, in the budget's unit; `None` takes the table's mean costs.
        general: the expert that answers queries that abstain; not checked against the budget. `None` takes the best of
            the table within it (for a cumulative budget, of the experts in the map).
        max_abstain: largest share of held-out training queries that may abstain; with 0 a query abstains only where it
            exceeds every held-out training query.
        ood_prompts: out-of-distribution prompts to tune the thresholds on; without any, whole categories are left out
            in their place. Not kept in the artifact.
        seed: of the inner folds, the clusters and the linear SVM.
    """

    classifier: ClassifierName = "logistic"
    c: float = 4.0
    k: int | None = None
    label_column: str | None = None
    n_clusters: int | None = None
    shrinkage: float = 10.0
    choice: ExpertChoice | None = None
    budget: float | None = None
    budget_kind: BudgetKind = "average-active"
    footprints: Mapping[str, float] | None = None
    general: str | None = None
    max_abstain: float = 0.01
    ood_prompts: Sequence[str] = field(default=(), metadata={"saved": False})
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is not None and np.isposinf(self.budget):
            object.__setattr__(self, "budget", None)  # JSON has no infinity
        _ = self.fitting(NEIGHBOURS), self.limit  # which check their parts
        check_range(self, "n_clusters", low=1)
        check_range(self, "shrinkage")
        check_range(self, "max_abstain", high=1)
        on_average = self.limit is not None and self.budget_kind == "average-active"
        if self.choice is None:
            object.__setattr__(self, "choice", "category" if on_average else "expected")
        check_choice(self, "choice", get_args(ExpertChoice))
        if self.choice != "category" and on_average:
            raise InvalidSettings("an average-active budget is met by the map alone: it needs choice 'category'")

    def fitting(self, n: int) -> ClassifierSettings:
        """Which classifier, and how it is fitted to n training queries."""
        k = min(NEIGHBOURS, n) if self.k is None else self.k
        return ClassifierSettings(self.classifier, self.c, k, self.seed)

    def clusters(self, n: int) -> int:
        """Number of clusters of n training queries without labels."""
        return max(1, min(CLUSTERS, n // LEAST_MEMBERS)) if self.n_clusters is None else self.n_clusters

    @property
    def limit(self) -> Budget | None:
        """The budget; `None` for no limit."""
        return None if self.budget is None else Budget(self.budget, self.budget_kind)


class CategoryRouter(EmbeddingRouter[CategorySettings, CategoryModel]):
    """Classify the query, then choose the expert that a budgeted map gives for its category.

    From the paper: the two steps (text embedding -> classifier -> category; category -> expert from the experts' scores
    in each category under a parameter budget, cumulative or average active), and a general category for uncertain
    prompts. Ours: the classifiers other than kNN and their temperature scaling; the integer programme
    (`routers.kinds.category.mapping`); scores w_mk that are means over all queries, each weighted by the probability of
    category m from a classifier that was not trained on it; their shrinkage to the table's mean; the choice by expected
    score; the two abstention tests and how their thresholds are tuned (`routers.numeric.abstention`).

    The estimate has quality (n, K) = sum_m P(category m) w_mk, the expected score; for a query that abstains, the
    experts' mean scores. `eligible` is the chosen expert alone: the mapped one, or the generalist (`soft` makes more
    eligible). `ood` is the share of held-out training queries that lie nearer to the training data. `confidence` is the
    calibrated probability that the query's category is one that the map gives to the chosen expert.
    """

    kind: ClassVar[str] = "category"
    Settings = CategorySettings
    Model = CategoryModel

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table; raises RouterError before `fit`."""
        return self.model.data.rows

    def fit(self, table: OutcomeTable) -> Self:
        """Learn categories, map and thresholds from n prompts with their scores.

        Raises:
            RouterError: a budget that cannot be met, an unknown expert in `general` or `footprints`, fewer rows than
                the `k` or `n_clusters` that were set, or embeddings that are not finite.
            InvalidOutcomes: `label_column` is not in the table.
        """
        ood_prompts = self.settings.ood_prompts
        data = TrainingData(
            TrainingRows.of(table),
            embed(self.encoder, table.prompts),
            self._labels(table),
            embed(self.encoder, ood_prompts) if ood_prompts else None,
        )
        self._model = learned(data, self.settings)
        return self

    def extended(self, table: OutcomeTable) -> Self:
        """A router with n further rows, equal to one fitted on all rows. Only the new prompts are encoded.

        Everything but the embeddings is learned again: classifier (or clusters), map and thresholds.
        """
        data, labels = self.model.data, self._labels(table)
        more = replace(
            data,
            rows=data.rows.joined(TrainingRows.of(table)),
            vectors=np.vstack([data.vectors, embed(self.encoder, table.prompts)]),
            labels=None if data.labels is None or labels is None else data.labels + labels,
        )
        return self.with_model(learned(more, self.settings))

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router with other outcomes of the same queries, equal to one fitted on them. Nothing is encoded."""
        return self.with_model(learned(replace(self.model.data, rows=rows), self.settings))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected score of each of the K experts on each of the n queries; see the class."""
        vectors, truncated = read_queries(self.encoder, queries)
        return replace(self.model.estimate(vectors), truncated=truncated)

    def _labels(self, table: OutcomeTable) -> tuple[str, ...] | None:
        """n names of categories; `None` where the queries are to be clustered."""
        if self.settings.label_column is None and table.domains is None:
            return None
        return table.labels(self.settings.label_column or "domain")


def learned(data: TrainingData, settings: CategorySettings) -> CategoryModel:
    """Fit classifier, calibration, map and thresholds."""
    rows, x, costs = data.rows, data.vectors, data.rows.costs
    categories, y = _categories(data, settings)
    footprints = footprints_of(rows, settings.footprints, settings.limit)
    fitting = settings.fitting(len(x))
    classifier = fit_classifier(fitting, x, y)
    rng = np.random.default_rng(settings.seed)
    unseen = cross_fit(fitting, x, y, rng)
    members = unseen.memberships(y)
    scores = shrunk_means(rows.scores, members, settings.shrinkage)
    expert_of = map_categories(members.sum(axis=0), scores, footprints, settings.limit)
    kept = kept_by(settings.limit, expert_of, len(rows.experts))
    general = generalist(rows, settings.general, kept, footprints, settings.limit)
    outside = _outside(data, classifier, y, settings, unseen.temperature, rng)
    doubt, held_out, choice = unseen.doubt(), unseen.rows, settings.choice or "expected"
    routed = choose(members[held_out], expert_of, scores, choice, kept)
    gain = rows.scores[held_out, general] - rows.scores[held_out, routed]
    return CategoryModel(
        data=data,
        categories=categories,
        classifier=classifier,
        temperature=unseen.temperature,
        thresholds=tune_thresholds(doubt, outside, gain, settings.max_abstain) if len(doubt) else Thresholds(),
        distance_quantiles=quantiles(doubt.distance if len(doubt) else np.array([2.0])),
        expert_of=expert_of,
        kept=kept,
        choice=choice,
        general=general,
        scores=scores,
        mean_scores=rows.scores.mean(axis=0),
        costs=None if costs is None else shrunk_means(costs, members, settings.shrinkage),
        mean_costs=None if costs is None else costs.mean(axis=0),
    )


def _categories(data: TrainingData, settings: CategorySettings) -> tuple[tuple[str, ...], Labels]:
    """M names and (n,) labels."""
    labels = _clusters(data.vectors, settings) if data.labels is None else data.labels
    names, y = np.unique(np.array(labels, dtype=object), return_inverse=True)
    if len(names) < 2:
        warnings.warn(
            f"every training query is of category {names[0]!r}, so this router always chooses its best single expert: "
            "name another column as label_column, or use kind 'knn'",
            stacklevel=4,
        )
    return tuple(names.tolist()), np.asarray(y, dtype=np.intp)


def _clusters(x: Vectors, settings: CategorySettings) -> tuple[str, ...]:
    centres = kmeans(x, settings.clusters(len(x)), settings.seed, starts=CLUSTER_STARTS)
    return tuple(f"cluster-{cluster:03d}" for cluster in top_k(x, centres, 1)[1][:, 0])


def _outside(
    data: TrainingData,
    classifier: Classifier,
    y: Labels,
    settings: CategorySettings,
    temperature: float,
    rng: np.random.Generator,
) -> Doubt:
    """Doubt about out-of-distribution prompts: those given, or categories that a classifier was not trained on."""
    if data.ood_vectors is None:
        return left_out_categories(settings.fitting(len(y)), data.vectors, y, temperature, rng)
    p = probabilities(classifier.logits(data.ood_vectors), temperature)
    return Doubt(normalised_entropy(p), nearest_distance(data.ood_vectors, data.vectors))
