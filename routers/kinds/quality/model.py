"""The trained model of QualityRouter as plain arrays: estimates, and its saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate
from routers.fitted import under
from routers.kinds.quality.features import Features, Seen, Texts
from routers.kinds.quality.learners import Floats, Learner, learner_class
from routers.kinds.quality.stacking import Stack
from routers.numeric.neighbours import Vectors, nearest_distance, share_nearer
from routers.numeric.ridge import LinearFit, fit_ridge

_LEAST_COST_USD = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """USD per query: exp of a linear fit, clipped to the training range, times a factor that keeps each expert's mean.

    low, high: (m,) log costs seen in training; factor: (m,).
    """

    linear: LinearFit
    low: Floats
    high: Floats
    factor: Floats

    def predict(self, x: NDArray[Any]) -> Floats:
        """(n, m) USD."""
        return self._relative(x) * self.factor

    def _relative(self, x: NDArray[Any]) -> Floats:
        return np.asarray(np.exp(self.linear.predict(x).clip(self.low, self.high)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything."""
        return {**self.linear.arrays(), "low": self.low, "high": self.high, "factor": self.factor}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays`."""
        return cls(LinearFit.restored(arrays), arrays["low"], arrays["high"], arrays["factor"])


def fit_costs(x: NDArray[Any], costs_usd: Floats) -> Costs:
    """The costs (n, m) of n queries with (n, d) features."""
    logs = np.log(np.maximum(costs_usd, _LEAST_COST_USD))
    found = Costs(fit_ridge(x, logs), logs.min(axis=0), logs.max(axis=0), np.ones(logs.shape[1]))
    factor = costs_usd.mean(axis=0) / found.predict(x).mean(axis=0)
    return Costs(found.linear, found.low, found.high, factor)


@dataclass(frozen=True, slots=True, eq=False)
class QualityModel:
    """K learners of m experts.

    Attributes:
        members: name -> learner, in the order of the stack's weights.
        costs: `None` where unknown.
        vectors: (N, dim) embeddings of some training queries, for the out-of-distribution score.
        distance_quantiles: of training queries to their nearest other among `vectors`.
    """

    experts: tuple[str, ...]
    features: Features
    members: Mapping[str, Learner]
    stack: Stack
    costs: Costs | None
    vectors: Vectors
    distance_quantiles: Floats

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.vectors.shape[1])

    def estimate(self, queries: Texts, truncated: NDArray[np.bool_]) -> Estimate:
        """The estimate of n queries; see `QualityRouter`."""
        seen = self.features.transform(queries)
        return Estimate(
            experts=self.experts,
            quality=self.quality(seen),
            cost_usd=None if self.costs is None else self.costs.predict(seen.x),
            ood=share_nearer(nearest_distance(queries.embeddings, self.vectors), self.distance_quantiles),
            labels=self._labels(seen),
            truncated=truncated,
        )

    def quality(self, seen: Seen) -> Floats:
        """(n, m) calibrated scores."""
        return self.stack.combine(np.stack([member.predict(seen) for member in self.members.values()]))

    def _labels(self, seen: Seen) -> tuple[str, ...] | None:
        if seen.p is None:
            return None
        names = self.features.categories[0].names
        return tuple(names[c] for c in seen.p[:, : len(names)].argmax(axis=1))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        parts: dict[str, Mapping[str, NDArray[Any]]] = {"features": self.features.arrays()}
        parts |= {f"member-{name}": member.arrays() for name, member in self.members.items()}
        parts["stack"] = self.stack.arrays()
        if self.costs is not None:
            parts["costs"] = self.costs.arrays()
        found = {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
        return {**found, "vectors": self.vectors, "distance_quantiles": self.distance_quantiles}

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON values; with the stack's weights for people to read."""
        names = [*self.members, "expert means"]
        weights = {
            part: dict(zip(names, getattr(self.stack, part).round(4).tolist(), strict=True))
            for part in ("ranking", "level")
        }
        return {"experts": list(self.experts), "features": self.features.settings(), "stack_weights": weights}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: Any) -> Self:
        """The model of `arrays()` and `values()`, for settings with its `learners`; its estimates are identical."""
        return cls(
            experts=tuple(values["experts"]),
            features=Features.restored(under("features.", arrays), values["features"]),
            members={
                name: learner_class(name).restored(under(f"member-{name}.", arrays)) for name in settings.learners
            },
            stack=Stack.restored(under("stack.", arrays)),
            costs=Costs.restored(found) if (found := under("costs.", arrays)) else None,
            vectors=arrays["vectors"],
            distance_quantiles=arrays["distance_quantiles"],
        )
