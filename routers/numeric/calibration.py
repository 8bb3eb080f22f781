"""Platt scaling: logits of each expert to probabilities, on rows that the logits were not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.numeric.records import ArrayRecord

_Floats = NDArray[np.float64]
SLOPE_BOUNDS = (0.0, 100.0)
OFFSET_BOUNDS = (-20.0, 20.0)


@dataclass(frozen=True, slots=True, eq=False)
class Platt(ArrayRecord):
    """probability = sigmoid(slope * logit + offset), a pair for each of m columns.

    slope, offset: (m,). Slopes are not negative, so that the order within a column is preserved.
    """

    slope: _Floats
    offset: _Floats

    def probabilities(self, logits: _Floats) -> _Floats:
        """(n, m) of (n, m) logits."""
        return sigmoid(logits * self.slope + self.offset)


def sigmoid(z: NDArray[Any]) -> _Floats:
    """1 / (1 + exp(-z)), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(z, dtype=np.float64))))


def fit_platt(logits: _Floats, scores: _Floats, *, shared: bool = False) -> Platt:
    """The slope and offset of least cross-entropy for each column of (n, m) logits against (n, m) scores in [0, 1].

    With `shared` all columns have the same pair, so that the order between columns is preserved too.

    As in Platt (1999) the targets are smoothed by two further rows, one right and one wrong, so that an expert that is
    always right, or never, does not get probability 1 or 0.
    """
    if shared:
        slope, offset = _fit(logits.ravel(), scores.ravel())
        return Platt(np.full(logits.shape[1], slope), np.full(logits.shape[1], offset))
    pairs = [_fit(logits[:, column], scores[:, column]) for column in range(logits.shape[1])]
    return Platt(np.array([slope for slope, _ in pairs]), np.array([offset for _, offset in pairs]))


def _fit(z: _Floats, y: _Floats) -> tuple[float, float]:
    from scipy.optimize import minimize

    right, n = float(y.sum()), len(y)
    target = y * (right + 1) / (right + 2) + (1 - y) / (n - right + 2)

    def loss(pair: _Floats) -> tuple[float, _Floats]:
        a = pair[0] * z + pair[1]
        error = sigmoid(a) - target
        return float((np.logaddexp(0.0, a) - target * a).mean()), np.array([(error * z).mean(), error.mean()])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[SLOPE_BOUNDS, OFFSET_BOUNDS])
    return float(found.x[0]), float(found.x[1])
