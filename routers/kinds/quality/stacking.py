"""Stacking (Wolpert 1992, Breiman 1996): several learners' predictions become one calibrated estimate.

Learner k predicts P_k (n, m). A prediction has two parts: its mean over the experts (the difficulty of the query) and
the rest (which expert is better). Each part is stacked with its own weights, non-negative and with sum 1, by least
squares on held-out predictions. One set of weights for both would let the difficulty, which is most of the variance,
determine the ranking, which routes. The experts' mean scores are one more member of both stacks: the estimate shrinks
to them by their weight, and where nothing can be learned they have all of it and every query goes to the best single
expert. Finally one increasing curve for all experts, sigmoid(a + b logit(.)), calibrates the estimate; the order of
the experts does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.kinds.quality.learners import Floats, centred
from routers.numeric.calibration import sigmoid

_SUM_TO_ONE = 1e3
"""Penalty on the sum of the weights: in effect a constraint; the weights are then normalised."""
_MARGIN = 0.005
"""Estimates are clipped this far from 0 and 1 before their log-odds are taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The weights of K members; the last weight of each is that of the experts' means.

    means: (m,) mean scores; ranking, level: (K + 1,) weights; intercept, slope: of the curve, slope > 0.
    """

    means: Floats
    ranking: Floats
    level: Floats
    intercept: float
    slope: float

    def combine(self, predictions: Floats) -> Floats:
        """(n, m) calibrated scores of (K, n, m) predictions."""
        return sigmoid(self.intercept + self.slope * _logit(self.joined(predictions)))

    def joined(self, predictions: Floats) -> Floats:
        """(n, m) weighted means of (K, n, m) predictions, not calibrated."""
        members = _with_means(predictions, self.means)
        ranks = np.tensordot(self.ranking, _ranks(members), axes=1)
        levels = np.tensordot(self.level, members.mean(axis=2), axes=1)
        return np.asarray(ranks + levels[:, None])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything."""
        curve = np.array([self.intercept, self.slope])
        return {"means": self.means, "ranking": self.ranking, "level": self.level, "curve": curve}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays`; raises KeyError where one is missing."""
        intercept, slope = arrays["curve"].tolist()
        return cls(arrays["means"], arrays["ranking"], arrays["level"], intercept, slope)


def fit_stack(predictions: Floats, y: Floats) -> Stack:
    """The stack of (K, n, m) predictions of rows that no member was fitted on, for (n, m) scores."""
    means = y.mean(axis=0)
    members = np.concatenate([predictions, _means_of_others(y)[None]])
    ranking = stack_weights(_ranks(members), centred(y))
    level = stack_weights(members.mean(axis=2), y.mean(axis=1))
    uncalibrated = Stack(means, ranking, level, 0.0, 1.0)
    intercept, slope = _fit_curve(_logit(uncalibrated.joined(predictions)), y)
    return Stack(means, ranking, level, intercept, slope)


def _means_of_others(y: Floats) -> Floats:
    """(n, m) means of the other rows: like the predictions, they have not seen the row.

    The means of all rows include the row itself, which gives them too much weight on a small table.
    """
    if len(y) < 2:
        return y
    return np.asarray((y.sum(axis=0) - y) / (len(y) - 1))


def stack_weights(members: Floats, target: Floats) -> Floats:
    """(K,) weights >= 0 with sum 1 of least mean squared error, of (K, ...) members and a (...) target."""
    from scipy.optimize import nnls

    a = members.reshape(len(members), -1)
    scale = np.sqrt(a.shape[1])
    gram, moment = a @ a.T / scale**2, a @ target.ravel() / scale**2
    # |A w - t|^2 = |R w - q|^2 + const with gram = R^T R: a small problem, whatever n and m are
    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0.0:  # all members are equal
        return np.asarray(np.eye(len(a))[-1])
    kept = values > values[-1] * 1e-12
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    right = (vectors[:, kept].T @ moment) / np.sqrt(values[kept])
    penalty = _SUM_TO_ONE * max(float(np.sqrt(values[-1])), 1e-12)
    weights, _ = nnls(np.vstack([root, np.full((1, len(a)), penalty)]), np.append(right, penalty))
    return np.asarray(weights / weights.sum())


def _with_means(predictions: Floats, means: Floats) -> Floats:
    """(K + 1, n, m): the means as one more member."""
    return np.concatenate([predictions, np.broadcast_to(means, (1, *predictions.shape[1:]))])


def _ranks(members: Floats) -> Floats:
    return np.asarray(members - members.mean(axis=2, keepdims=True))


def _logit(p: Floats) -> Floats:
    inside = p.clip(_MARGIN, 1 - _MARGIN)
    return np.asarray(np.log(inside / (1 - inside)))


def _fit_curve(logits: Floats, y: Floats) -> tuple[float, float]:
    """Intercept and positive slope of least cross-entropy, over all queries and experts (Platt scaling)."""
    from scipy.optimize import minimize

    def loss(parameters: Floats) -> tuple[float, Floats]:
        z = parameters[0] + np.exp(parameters[1]) * logits
        error = sigmoid(z) - y
        slope = float((error * logits).mean() * np.exp(parameters[1]))
        return float((np.logaddexp(0.0, z) - y * z).mean()), np.array([error.mean(), slope])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-10, 10), (-3, 3)])
    return float(found.x[0]), float(np.exp(found.x[1]))
