"""The trained model of CategoryRouter as plain arrays: estimates from embeddings, and its saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import GENERAL, Estimate
from routers.fitted import under
from routers.numeric.abstention import Doubt, Thresholds, normalised_entropy
from routers.numeric.classifiers import Classifier, probabilities, restore
from routers.numeric.neighbours import Vectors, nearest_distance, share_nearer
from routers.outcomes.training_rows import TrainingRows

CLASSIFIER_PREFIX = "classifier."
_ARRAYS = ("vectors", "distance_quantiles", "expert_of", "kept", "scores", "mean_scores", "costs", "mean_costs")

_Floats = NDArray[np.float64]
ExpertChoice = Literal["expected", "category", "soft"]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Training data of everything but the embeddings: N queries.

    Attributes:
        vectors: (N, dim) embeddings.
        labels: N categories; `None` where they are clusters.
        ood_vectors: (n_ood, dim) embeddings of the out-of-distribution prompts that were given, or `None`.
    """

    rows: TrainingRows
    vectors: Vectors
    labels: tuple[str, ...] | None
    ood_vectors: Vectors | None


@dataclass(frozen=True, slots=True, eq=False)
class CategoryModel:
    """M categories, K experts, and N training queries.

    Attributes:
        temperature: calibrates the classifier's logits.
        distance_quantiles: distances of held-out training queries to the training data.
        expert_of: (M,) the map, as columns of `experts`; general: the column of the generalist.
        kept: (K,) bool: the experts that a cumulative budget keeps; without one, all.
        choice: how an expert follows from the probabilities, see `choose`.
        scores, costs: (M, K) mean score and USD of each expert in each category, shrunk to the mean over all queries,
            which is mean_scores, mean_costs (K,). Costs are `None` where unknown.
    """

    data: TrainingData
    categories: tuple[str, ...]
    classifier: Classifier
    temperature: float
    thresholds: Thresholds
    distance_quantiles: _Floats
    expert_of: NDArray[np.intp]
    kept: NDArray[np.bool_]
    choice: ExpertChoice
    general: int
    scores: _Floats
    mean_scores: _Floats
    costs: _Floats | None
    mean_costs: _Floats | None

    @property
    def experts(self) -> tuple[str, ...]:
        """K names."""
        return self.data.rows.experts

    @property
    def vectors(self) -> Vectors:
        """(N, dim) training embeddings."""
        return self.data.vectors

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.vectors.shape[1])

    def estimate(self, x: Vectors) -> Estimate:
        """The estimate for (n, dim) embeddings; see `CategoryRouter`."""
        p = probabilities(self.classifier.logits(x), self.temperature)
        doubt = Doubt(normalised_entropy(p), nearest_distance(x, self.vectors))
        abstained = self.thresholds.exceeded(doubt)
        label = p.argmax(axis=1)
        best = choose(p, self.expert_of, self.scores, self.choice, self.kept)
        chosen = np.where(abstained, self.general, best)
        columns = np.arange(len(self.experts))
        agreeing = p @ (self.expert_of[:, None] == columns)  # (n, K): P(the category's expert is this one)
        cost_usd = None
        if self.costs is not None and self.mean_costs is not None:
            cost_usd = _expected(p, self.costs, abstained, self.mean_costs)
        return Estimate(
            experts=self.experts,
            quality=_expected(p, self.scores, abstained, self.mean_scores).clip(0.0, 1.0),
            cost_usd=cost_usd,
            ood=share_nearer(doubt.distance, self.distance_quantiles),
            labels=tuple(GENERAL if a else self.categories[m] for m, a in zip(label, abstained, strict=True)),
            eligible=self._eligible(chosen, abstained),
            abstained=abstained,
            confidence=None if self.choice == "soft" else agreeing[np.arange(len(x)), chosen].clip(0.0, 1.0),
            reasons=tuple(
                self._doubtful(p[i], float(doubt.entropy[i]), float(doubt.distance[i]))
                if abstained[i]
                else self._sure(p[i], int(chosen[i]))
                for i in range(len(x))
            ),
        )

    def _eligible(self, chosen: NDArray[np.intp], abstained: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(n, K): the chosen expert; with `soft` all that are kept, unless the query abstains."""
        alone = chosen[:, None] == np.arange(len(self.experts))
        return np.where(abstained[:, None], alone, self.kept) if self.choice == "soft" else alone

    def _guess(self, p: _Floats) -> str:
        m = int(p.argmax())
        return f"category {self.categories[m]!r} (p={p[m]:.2f})"

    def _doubtful(self, p: _Floats, entropy: float, distance: float) -> str:
        failed = self.thresholds.explain(entropy, distance)
        return f"unsure, so the generalist {self.experts[self.general]}: {failed}; the guess was {self._guess(p)}"

    def _sure(self, p: _Floats, chosen: int) -> str:
        if self.choice == "soft":
            return f"{self._guess(p)}; over all categories {self.experts[chosen]} is expected to do best"
        mapped = int(self.expert_of[p.argmax()])
        reason = f"{self._guess(p)} is mapped to {self.experts[mapped]}"
        if chosen == mapped:
            return reason
        ours, theirs = p @ self.scores[:, chosen], p @ self.scores[:, mapped]
        other = self.experts[chosen]
        return f"{reason}, but over all categories {other} is expected to do better: {ours:.3f} > {theirs:.3f}"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array, training and out-of-distribution embeddings included."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        kept["ood_vectors"] = self.data.ood_vectors
        if self.data.labels is not None:
            kept["labels"] = np.searchsorted(self.categories, self.data.labels)
        parts = {CLASSIFIER_PREFIX + name: array for name, array in self.classifier.arrays().items()}
        found = {**kept, **parts, **self.data.rows.arrays()}
        return {name: array for name, array in found.items() if array is not None}

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {
            "categories": list(self.categories),
            "choice": self.choice,
            "general_expert": self.experts[self.general],
            "temperature": self.temperature,
            "entropy_threshold": _or_none(self.thresholds.entropy),
            "distance_threshold": _or_none(self.thresholds.distance),
            **self.data.rows.settings(),
        }

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: object) -> Self:
        """The model of `arrays()` and `values()`; its estimates are identical to the bit."""
        categories, vectors = tuple(values["categories"]), arrays["vectors"]
        labels = tuple(categories[i] for i in arrays["labels"]) if "labels" in arrays else None
        rows = TrainingRows.restored(arrays, values)
        limits = (_or_infinite(values[name]) for name in ("entropy_threshold", "distance_threshold"))
        always = ("distance_quantiles", "expert_of", "kept", "scores", "mean_scores")
        return cls(
            data=TrainingData(rows, vectors, labels, arrays.get("ood_vectors")),
            categories=categories,
            classifier=restore(under(CLASSIFIER_PREFIX, arrays), vectors),
            temperature=values["temperature"],
            thresholds=Thresholds(*limits),
            choice=values["choice"],
            general=rows.experts.index(values["general_expert"]),
            **{name: arrays[name] for name in always},
            costs=arrays.get("costs"),
            mean_costs=arrays.get("mean_costs"),
        )


def choose(
    p: _Floats, expert_of: NDArray[np.intp], scores: _Floats, choice: ExpertChoice, kept: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """(n,) columns of the experts for (n, M) category probabilities.

    `category` takes the expert that the map assigns to the likeliest category. `expected` takes, of the experts in the
    map, the one of highest expected score sum_m p_m w_mk: the same where one category is certain, better where several
    are likely. `soft` takes the one of highest expected score among all that are `kept`.
    """
    # Without an average-active budget the experts of the map compete by expected score: half a point better on one
    # recorded table than the likeliest category's expert, and no worse on the others. Only the hard map keeps a budget.
    if choice == "category":
        return np.asarray(expert_of[p.argmax(axis=1)])
    columns = np.flatnonzero(kept) if choice == "soft" else np.unique(expert_of)
    return np.asarray(columns[(p @ scores[:, columns]).argmax(axis=1)])


def _expected(p: _Floats, by_category: _Floats, abstained: NDArray[np.bool_], overall: _Floats) -> _Floats:
    """(n, K) mean over the categories, or the overall mean for queries that abstain."""
    return np.where(abstained[:, None], overall, p @ by_category)


def _or_none(limit: float) -> float | None:
    return None if np.isinf(limit) else limit  # JSON has no infinity


def _or_infinite(limit: float | None) -> float:
    return np.inf if limit is None else limit
