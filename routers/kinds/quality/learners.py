"""Learners: from the features of n queries (`quality.features.Seen`) to the scores of m experts.

A fitted learner is plain arrays and predicts with numpy; fitting needs scikit-learn, scipy or torch. `ridge` and the
trees learn scores that are centred over the experts of each query, which is the difference between experts. The mean
over experts comes from the category estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidSettings
from routers.kinds.quality.features import Seen
from routers.numeric.calibration import sigmoid
from routers.numeric.neighbours import top_k
from routers.numeric.records import ArrayRecord
from routers.numeric.ridge import LinearFit, fit_ridge

Floats = NDArray[np.float64]

LEARNERS: dict[str, str] = {
    "category": "routers.kinds.quality.learners:Category",
    "ridge": "routers.kinds.quality.learners:Ridge",
    "logistic": "routers.kinds.quality.learners:Logistic",
    "knn": "routers.kinds.quality.learners:Neighbours",
    "trees": "routers.kinds.quality.learner_trees:Trees",
    "guided-trees": "routers.kinds.quality.learner_trees:GuidedTrees",
    "residual-trees": "routers.kinds.quality.learner_trees:ResidualTrees",
    "mlp": "routers.kinds.quality.learner_mlp:Networks",
}
"""name -> `module:Class`, imported only when it is used."""

PRIOR_QUERIES = 10.0
"""The scores of a category shrink to the table's mean with the weight of this many queries."""
NEIGHBOURS = 100
LOGISTIC_PENALTY = 1e-3
ROWS_AT_ONCE = 256


class Learner(Protocol):
    """A fitted learner of m experts."""

    def predict(self, seen: Seen) -> Floats:
        """(n, m) scores, not clipped to [0, 1]."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `restored` reads."""
        ...


class LearnerClass(Protocol):
    """A class in `LEARNERS`."""

    def fit(self, seen: Seen, y: Floats, rng: np.random.Generator) -> Learner:
        """Learn (n, m) scores of n queries."""
        ...

    def restored(self, arrays: Mapping[str, NDArray[Any]]) -> Learner:
        """The learner of `arrays()`; raises KeyError where one is missing."""
        ...


def learner_class(name: str) -> LearnerClass:
    """The class of a name.

    Raises:
        InvalidSettings: there is none of that name.
    """
    if name not in LEARNERS:
        raise InvalidSettings(f"no learner {name!r}; there are: {', '.join(LEARNERS)}")
    module, _, found = LEARNERS[name].partition(":")
    learner: LearnerClass = getattr(import_module(module), found)
    return learner


@dataclass(frozen=True, slots=True, eq=False)
class Category(ArrayRecord):
    """sum over categories of P(category) x score of the expert in it; the experts' means where there are no categories.

    Scores are means over training queries, weighted by their cross-fitted probabilities and shrunk to the table's mean.
    """

    scores: Floats  # (M, m), or (1, m) without categories

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Category:
        """Average the scores; `rng` is not used."""
        mean = y.mean(axis=0)
        if seen.p is None:
            return cls(mean[None])
        totals = seen.p.sum(axis=0)[:, None]
        return cls((seen.p.T @ y + PRIOR_QUERIES * mean) / (totals + PRIOR_QUERIES))

    def predict(self, seen: Seen) -> Floats:
        """(n, m) expected scores."""
        if seen.p is None:
            return np.repeat(self.scores, len(seen), axis=0)
        return np.asarray(seen.p @ self.scores)


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """The category estimate plus a linear function of all blocks."""

    base: Category
    linear: LinearFit

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Ridge:
        """Fit the residuals of the category estimate; `rng` is not used."""
        base, residual = residuals(seen, y, rng)
        return cls(base, fit_ridge(seen.x, residual))

    def predict(self, seen: Seen) -> Floats:
        """(n, m) scores."""
        return self.base.predict(seen) + self.linear.predict(seen.x)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Base and coefficients."""
        return {**self.base.arrays(), **self.linear.arrays()}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Ridge:
        """The reverse of `arrays`."""
        return cls(Category.restored(arrays), LinearFit.restored(arrays))


@dataclass(frozen=True, slots=True, eq=False)
class Logistic(ArrayRecord):
    """sigmoid(x @ weights + intercept) for each expert; a score between 0 and 1 counts as a share of both classes."""

    weights: Floats  # (d, m)
    intercept: Floats  # (m,)

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Logistic:
        """Minimise the penalised cross-entropy by L-BFGS; `rng` is not used."""
        from scipy.optimize import minimize

        x = np.hstack([seen.x.astype(np.float64), np.ones((len(seen), 1))])
        start = np.zeros((x.shape[1], y.shape[1]))
        found = minimize(_cross_entropy, start.ravel(), (x, y), jac=True, method="L-BFGS-B", options={"maxiter": 200})
        coefficients = found.x.reshape(start.shape)
        return cls(coefficients[:-1], coefficients[-1])

    def predict(self, seen: Seen) -> Floats:
        """(n, m) probabilities."""
        return sigmoid(seen.x @ self.weights + self.intercept)


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours(ArrayRecord):
    """The mean score of the nearest training queries, by cosine over all blocks."""

    rows: NDArray[np.float32]  # (N, d), of length 1
    scores: Floats  # (N, m)

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Neighbours:
        """Store the rows; `rng` is not used."""
        return cls(_directions(seen.x), y)

    def predict(self, seen: Seen) -> Floats:
        """(n, m) means over `NEIGHBOURS` training queries, or all where there are fewer."""
        _, near = top_k(_directions(seen.x), self.rows, min(NEIGHBOURS, len(self.rows)))
        parts = [self.scores[near[i : i + ROWS_AT_ONCE]].mean(axis=1) for i in range(0, len(near), ROWS_AT_ONCE)]
        return np.vstack([np.zeros((0, self.scores.shape[1])), *parts])


def residuals(seen: Seen, y: Floats, rng: np.random.Generator) -> tuple[Category, Floats]:
    """The category estimate and its residuals of (n, m) scores, centred over the experts of each query."""
    base = Category.fit(seen, y, rng)
    return base, centred(y - base.predict(seen))


def centred(values: Floats) -> Floats:
    """Each row of (n, m) values minus its mean."""
    return np.asarray(values - values.mean(axis=1, keepdims=True))


def fold_of(n: int, n_folds: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """(n,) random folds of equal size."""
    return np.asarray(rng.permutation(n) % n_folds, dtype=np.intp)


def cross_predict(
    learner: LearnerClass, seen: Seen, y: Floats, folds: NDArray[np.intp], rng: np.random.Generator
) -> Floats:
    """(n, m) predictions for each row by a learner fitted on the other folds."""
    found = np.empty(y.shape)
    for fold in np.unique(folds):
        inner, outer = folds != fold, folds == fold
        found[outer] = learner.fit(seen[inner], y[inner], rng).predict(seen[outer])
    return found


def _directions(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def _cross_entropy(flat: Floats, x: Floats, y: Floats) -> tuple[float, Floats]:
    """Mean over queries of the cross-entropy of all experts plus a penalty (not of the intercept), and its gradient."""
    weights = flat.reshape(x.shape[1], y.shape[1])
    logits = x @ weights
    penalised = weights.copy()
    penalised[-1] = 0.0
    loss = float((np.logaddexp(0.0, logits) - y * logits).sum() / len(x) + LOGISTIC_PENALTY * (penalised**2).sum())
    gradient = x.T @ (sigmoid(logits) - y) / len(x) + 2 * LOGISTIC_PENALTY * penalised
    return loss, gradient.ravel()
