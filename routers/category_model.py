"""What a trained CategoryRouter knows, as plain arrays: estimates from embeddings, and to and from a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.abstention import Doubt, Thresholds, normalised_entropy
from routers.base import GENERAL, Estimate
from routers.classifiers import Classifier, probabilities, restore
from routers.errors import InvalidArtifact
from routers.neighbours import Vectors, foreignness, nearest_distance

CLASSIFIER_PREFIX = "classifier."
_ARRAYS = ("vectors", "distance_quantiles", "expert_of", "scores", "mean_scores")
_COSTS = ("costs", "mean_costs")

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CategoryModel:
    """M categories, K experts, and N training embeddings.

    Attributes:
        temperature: calibrates the classifier's logits.
        distance_quantiles: how far held-out training queries lie from the training data.
        expert_of: (M,) the map, as columns of `experts`; general: the column of the generalist.
        scores, costs: (M, K) mean score and USD of each expert in each category, shrunk towards the mean over all
            queries, which is mean_scores, mean_costs (K,). Costs are `None` where unknown.
    """

    experts: tuple[str, ...]
    categories: tuple[str, ...]
    vectors: Vectors
    classifier: Classifier
    temperature: float
    thresholds: Thresholds
    distance_quantiles: _Floats
    expert_of: NDArray[np.intp]
    general: int
    scores: _Floats
    mean_scores: _Floats
    costs: _Floats | None
    mean_costs: _Floats | None

    def estimate(self, x: Vectors) -> Estimate:
        """The estimate for (n, dim) embeddings; see `CategoryRouter` for what it holds."""
        p = probabilities(self.classifier.logits(x), self.temperature)
        doubt = Doubt(normalised_entropy(p), nearest_distance(x, self.vectors))
        abstained = self.thresholds.exceeded(doubt)
        label = p.argmax(axis=1)
        chosen = np.where(abstained, self.general, self.expert_of[label])
        columns = np.arange(len(self.experts))
        agreeing = p @ (self.expert_of[:, None] == columns)  # (n, K): P(the category's expert is this one)
        return Estimate(
            experts=self.experts,
            quality=_expected(p, self.scores, abstained, self.mean_scores).clip(0.0, 1.0),
            cost_usd=None if self.costs is None else _expected(p, self.costs, abstained, self.mean_costs),
            ood=foreignness(doubt.distance, self.distance_quantiles),
            labels=tuple(GENERAL if a else self.categories[m] for m, a in zip(label, abstained, strict=True)),
            eligible=chosen[:, None] == columns,
            abstained=abstained,
            confidence=agreeing[np.arange(len(x)), chosen].clip(0.0, 1.0),
            reasons=tuple(self._reason(p[i], doubt, i, bool(abstained[i])) for i in range(len(x))),
        )

    def _reason(self, p: _Floats, doubt: Doubt, i: int, abstained: bool) -> str:
        m = int(p.argmax())
        guess = f"category {self.categories[m]!r} (p={p[m]:.2f})"
        if not abstained:
            return f"{guess} is mapped to {self.experts[self.expert_of[m]]}"
        failed = self.thresholds.explain(float(doubt.entropy[i]), float(doubt.distance[i]))
        return f"unsure, so the generalist {self.experts[self.general]}: {failed}; the guess was {guess}"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        kept = {name: getattr(self, name) for name in (*_ARRAYS, *_COSTS)}
        parts = {CLASSIFIER_PREFIX + name: array for name, array in self.classifier.arrays().items()}
        return {name: array for name, array in {**kept, **parts}.items() if array is not None}

    def settings(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {
            "experts": list(self.experts),
            "categories": list(self.categories),
            "general_expert": self.experts[self.general],
            "temperature": self.temperature,
            "entropy_threshold": _or_none(self.thresholds.entropy),
            "distance_threshold": _or_none(self.thresholds.distance),
        }

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Self:
        """What `arrays()` and `settings()` were taken from; its estimates are identical to the bit.

        Raises:
            InvalidArtifact: something is missing.
        """
        parts = {name: array for name, array in arrays.items() if name.startswith(CLASSIFIER_PREFIX)}
        try:
            experts = tuple(settings["experts"])
            return cls(
                experts=experts,
                categories=tuple(settings["categories"]),
                classifier=restore({n.removeprefix(CLASSIFIER_PREFIX): a for n, a in parts.items()}, arrays["vectors"]),
                temperature=settings["temperature"],
                thresholds=Thresholds(
                    _or_infinite(settings["entropy_threshold"]), _or_infinite(settings["distance_threshold"])
                ),
                general=experts.index(settings["general_expert"]),
                **{name: arrays[name] for name in _ARRAYS},
                **{name: arrays.get(name) for name in _COSTS},
            )
        except (KeyError, ValueError) as error:
            raise InvalidArtifact(f"the saved category router lacks {error}: train it again") from error


def _expected(p: _Floats, by_category: _Floats, abstained: NDArray[np.bool_], overall: _Floats | None) -> _Floats:
    """(n, K) mean over the categories, or the overall mean for queries that abstain."""
    return np.where(abstained[:, None], overall, p @ by_category)


def _or_none(limit: float) -> float | None:
    return None if np.isinf(limit) else limit  # JSON has no infinity


def _or_infinite(limit: float | None) -> float:
    return np.inf if limit is None else limit
