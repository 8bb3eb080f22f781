"""CategoryRouter: Composition of Experts (arXiv 2412.01868), a category classifier and a category -> expert map."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.encoders.embed import check_dim, embed, read_queries
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.kinds.category.budget import footprints_of, generalist, kept_by
from routers.kinds.category.mapping import Budget, BudgetKind, map_categories
from routers.kinds.category.model import CategoryModel, Choice, choose
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

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

_Floats = NDArray[np.float64]
CLUSTER_STARTS = 4
"""How often k-means begins anew where the categories are clusters: there are few, so that a bad start tells."""
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """What everything but the embeddings can be learned from again."""

    rows: TrainingRows
    vectors: Vectors  # (N, dim)
    labels: tuple[str, ...] | None  # N categories; `None` where they are clusters
    foreign: Vectors | None  # (n_foreign, dim) of the foreign prompts that were given


class CategoryRouter:
    """Classify the query, then ask the expert that a budgeted map gives for its category.

    From the paper: the two steps (text embedding -> classifier -> category; category -> expert from the experts' scores
    in each category under a parameter budget, cumulative or average active), and that uncertain prompts go to a general
    category. Ours: the classifiers beside kNN and their temperature scaling, the integer programme
    (`routers.kinds.category.mapping`), scores w_mk that are means over the queries which the classifier, not having
    seen them, puts into category m (each query counts by its probabilities), their shrinkage towards the table's mean,
    the choice by expected score, the two tests of doubt and how their thresholds are chosen
    (`routers.numeric.abstention`).

    The estimate has quality (n, K) = sum_m P(category m) w_mk, the expected score; for a query that abstains, the
    experts' mean scores. `eligible` is the chosen expert alone: the mapped one, or the generalist (`soft` lets more
    answer). `ood` is the share of held-out training queries that lie nearer to the training data. `confidence` is the
    calibrated probability that the query's category is one that the map gives to the chosen expert.

    Args:
        classifier: `logistic`, `linear-svm` or `knn`.
        c: inverse regularisation of the first two; k: neighbours of the last.
        label_column: the table's column of categories when training; `None` takes its domains, or where it has none
            k-means clusters of the embeddings, `n_clusters` of them. A query's own label is never read.
        shrinkage: the scores of a category are averaged with so many queries of the table's mean.
        choice: `category` asks the expert of the likeliest category; `expected` the one of highest expected score among
            all that the map keeps. `None` takes `category` under an average-active budget, which the others would not
            keep to, else `expected`. `soft` leaves every expert eligible (of those that a cumulative budget keeps), so
            that k experts can be asked and a cost weight has a choice; the confidence is then the quality of the best,
            and in doubt the generalist stays the only one.
        budget: most footprint, `None` for no limit; budget_kind: `cumulative` or `average-active`.
        footprints: parameters or price of each expert, in the budget's unit; `None` takes the table's mean costs.
        general: the expert that answers in doubt; not checked against the budget. `None` takes the best of the table
            within it (of the experts that the map keeps, for a cumulative budget).
        max_abstain: most held-out training queries that may abstain, a share; with 0 only those queries abstain that
            are stranger than every held-out training query.
        ood_prompts: foreign prompts to tune the thresholds on; where there are none, whole categories are left out to
            play them. Not kept in the artifact.
        seed: of the inner folds, the clusters and the linear SVM.
    """

    kind: ClassVar[str] = "category"
    requires: frozenset[str] = frozenset()

    def __init__(
        self,
        encoder: Encoder,
        *,
        classifier: ClassifierName = "logistic",
        c: float = 4.0,
        k: int = 15,
        label_column: str | None = None,
        n_clusters: int = 16,
        shrinkage: float = 10.0,
        choice: Choice | None = None,
        budget: float | None = None,
        budget_kind: BudgetKind = "average-active",
        footprints: Mapping[str, float] | None = None,
        general: str | None = None,
        max_abstain: float = 0.01,
        ood_prompts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.encoder = encoder
        self.classifier = ClassifierSettings(classifier, c, k, seed)
        self.label_column = label_column
        self.n_clusters = _within("n_clusters", n_clusters, 1)
        self.shrinkage = _within("shrinkage", shrinkage, 0)
        self.budget = None if budget is None or np.isposinf(budget) else Budget(budget, budget_kind)
        self.footprints = None if footprints is None else dict(footprints)
        self.choice = _choice(choice, self.budget)
        self.general = general
        self.max_abstain = _within("max_abstain", max_abstain, 0, 1)
        self.ood_prompts = tuple(ood_prompts)
        self.seed = seed
        self._model: CategoryModel | None = None
        self._memory: _Memory | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return () if self._model is None else self._model.experts

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table.

        Raises:
            RouterError: it is not trained yet.
        """
        return self._trained().rows

    @property
    def model(self) -> CategoryModel:
        """What training found.

        Raises:
            RouterError: it is not trained yet.
        """
        if self._model is None:
            raise RouterError("this category router is not trained: call fit(table), or load a saved one")
        return self._model

    def fit(self, table: OutcomeTable) -> Self:
        """Learn categories, map and thresholds from n prompts with their scores.

        Raises:
            RouterError: a budget that cannot be met, an unknown expert in `general` or `footprints`, fewer rows than
                neighbours or clusters, or embeddings that are not finite.
            InvalidOutcomes: `label_column` is not in the table.
        """
        memory = _Memory(
            TrainingRows.of(table),
            embed(self.encoder, table.prompts),
            self._labels(table),
            embed(self.encoder, self.ood_prompts) if self.ood_prompts else None,
        )
        return self._learn(memory)

    def extended(self, table: OutcomeTable) -> Self:
        """A router that has also seen the n rows of a table; equal to one fitted on all rows. Encodes only the new.

        Everything but the embeddings is learned again: classifier (or clusters), map and thresholds.
        """
        memory = self._trained()
        labels = self._labels(table)
        more = replace(
            memory,
            rows=memory.rows.joined(TrainingRows.of(table)),
            vectors=np.vstack([memory.vectors, embed(self.encoder, table.prompts)]),
            labels=None if memory.labels is None or labels is None else memory.labels + labels,
        )
        return self._untrained()._learn(more)

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router that knows other outcomes of the same queries; equal to one fitted on them. Encodes nothing."""
        return self._untrained()._learn(replace(self._trained(), rows=rows))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each of the K experts would score on each of the n queries; see the class."""
        vectors, truncated = read_queries(self.encoder, queries)
        return replace(self.model.estimate(vectors), truncated=truncated)

    def state(self) -> RouterState:
        """The trained router as data, embeddings of the training and the foreign prompts included, prompts not."""
        memory = self._trained()
        arrays = {**self.model.arrays(), **memory.rows.arrays()}
        if memory.labels is not None:
            arrays["labels"] = np.searchsorted(self.model.categories, memory.labels)
        if memory.foreign is not None:
            arrays["foreign"] = memory.foreign
        settings = {**self.model.settings(), **memory.rows.settings()}
        return RouterState(arrays, {"settings": self._settings(), **settings})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        arrays = state.arrays
        router = cls(encoder, **state.settings.get("settings", {}))
        model = CategoryModel.restored(arrays, state.settings)
        labels = tuple(model.categories[i] for i in arrays["labels"]) if "labels" in arrays else None
        try:
            rows = TrainingRows.restored(arrays, state.settings)
        except KeyError as error:
            raise InvalidArtifact(f"the saved category router lacks {error}: train it again") from error
        router._memory = _Memory(rows, model.vectors, labels, arrays.get("foreign"))
        router._model = model
        check_dim(encoder, model.vectors, cls.kind)
        return router

    def _settings(self) -> dict[str, Any]:
        return {
            "classifier": self.classifier.name,
            "c": self.classifier.c,
            "k": self.classifier.k,
            "label_column": self.label_column,
            "n_clusters": self.n_clusters,
            "shrinkage": self.shrinkage,
            "choice": self.choice,
            "budget": self.budget and self.budget.limit,
            "budget_kind": self.budget.kind if self.budget else "average-active",
            "footprints": self.footprints,
            "general": self.general,
            "max_abstain": self.max_abstain,
            "seed": self.seed,
        }

    def _untrained(self) -> Self:
        return type(self)(self.encoder, **self._settings())

    def _trained(self) -> _Memory:
        if self._memory is None:
            raise RouterError("this category router is not trained: call fit(table), or load a saved one")
        return self._memory

    def _learn(self, memory: _Memory) -> Self:
        rows, x = memory.rows, memory.vectors
        categories, y = self._categories(memory)
        footprints = footprints_of(rows, self.footprints, self.budget)
        classifier = fit_classifier(self.classifier, x, y)
        rng = np.random.default_rng(self.seed)
        unseen = cross_fit(self.classifier, x, y, rng)
        members = unseen.memberships(y)
        scores = shrunk_means(rows.scores, members, self.shrinkage)
        expert_of = map_categories(members.sum(axis=0), scores, footprints, self.budget)
        kept = kept_by(self.budget, expert_of, len(rows.experts))
        general = generalist(rows, self.general, kept, footprints, self.budget)
        foreign = self._foreign(classifier, memory, y, unseen.temperature, rng)
        doubt, held_out = unseen.doubt(), unseen.rows
        routed = choose(members[held_out], expert_of, scores, self.choice, kept)
        gain = rows.scores[held_out, general] - rows.scores[held_out, routed]
        costs = rows.costs
        self._memory = memory
        self._model = CategoryModel(
            experts=rows.experts,
            categories=categories,
            vectors=x,
            classifier=classifier,
            temperature=unseen.temperature,
            thresholds=tune_thresholds(doubt, foreign, gain, self.max_abstain) if len(doubt) else Thresholds(),
            distance_quantiles=quantiles(doubt.distance if len(doubt) else np.array([2.0])),
            expert_of=expert_of,
            kept=kept,
            choice=self.choice,
            general=general,
            scores=scores,
            mean_scores=rows.scores.mean(axis=0),
            costs=None if costs is None else shrunk_means(costs, members, self.shrinkage),
            mean_costs=None if costs is None else costs.mean(axis=0),
        )
        return self

    def _labels(self, table: OutcomeTable) -> tuple[str, ...] | None:
        """n names of categories; `None` where the queries have to be clustered."""
        if self.label_column is None and table.domains is None:
            return None
        return table.labels(self.label_column or "domain")

    def _categories(self, memory: _Memory) -> tuple[tuple[str, ...], Labels]:
        """M names and (n,) labels."""
        labels = self._clusters(memory.vectors) if memory.labels is None else memory.labels
        names, y = np.unique(np.array(labels, dtype=object), return_inverse=True)
        if len(names) < 2:
            warnings.warn(
                f"every training query is of category {names[0]!r}, so this router always asks its best single expert: "
                "name another column as label_column, or use kind 'knn'",
                stacklevel=4,
            )
        return tuple(names.tolist()), np.asarray(y, dtype=np.intp)

    def _clusters(self, x: Vectors) -> tuple[str, ...]:
        _, nearest = top_k(x, kmeans(x, self.n_clusters, self.seed, starts=CLUSTER_STARTS), 1)
        return tuple(f"cluster-{cluster:03d}" for cluster in nearest[:, 0])

    def _foreign(
        self, classifier: Classifier, memory: _Memory, y: Labels, temperature: float, rng: np.random.Generator
    ) -> Doubt:
        """How foreign prompts look: those given, or categories that a classifier was not trained on."""
        if memory.foreign is None:
            return left_out_categories(self.classifier, memory.vectors, y, temperature, rng)
        p = probabilities(classifier.logits(memory.foreign), temperature)
        return Doubt(normalised_entropy(p), nearest_distance(memory.foreign, memory.vectors))


def _choice(choice: Choice | None, budget: Budget | None) -> Choice:
    on_average = budget is not None and budget.kind == "average-active"
    if choice is not None and choice not in get_args(Choice):
        raise InvalidSettings(f"choice must be one of {', '.join(get_args(Choice))}, got {choice!r}")
    if choice not in (None, "category") and on_average:
        raise InvalidSettings("an average-active budget is met by the map alone: it needs choice 'category'")
    return choice or ("category" if on_average else "expected")


def _within(name: str, value: _Number, low: float, high: float = np.inf) -> _Number:
    if not low <= value <= high:
        raise InvalidSettings(f"{name} must lie in [{low}, {high}], got {value}")
    return value
