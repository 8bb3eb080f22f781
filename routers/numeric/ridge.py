"""Ridge regression of several targets, with the penalty of least generalised cross-validation error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.numeric.records import ArrayRecord

Floats = NDArray[np.float64]
ALPHAS = np.logspace(-1, 5, 25)
"""Candidate penalties."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit(ArrayRecord):
    """intercept + (x - mean) @ weights.

    mean: (d,); weights: (d, m); intercept: (m,).
    """

    mean: Floats
    weights: Floats
    intercept: Floats

    def predict(self, x: NDArray[Any]) -> Floats:
        """(n, m) of (n, d)."""
        return np.asarray(self.intercept + (x - self.mean) @ self.weights)


def fit_ridge(x: NDArray[Any], targets: Floats) -> LinearFit:
    """Fit (n, m) targets to (n, d) rows with the penalty of least generalised cross-validation error, one for all.

    The normal equations are solved by eigenvalues, once for all penalties. scikit-learn's RidgeCV finds the same
    penalties and errors and takes 13 to 35 times as long (docs/results.md), because it decomposes x.
    """
    mean, intercept = x.mean(axis=0, dtype=np.float64), targets.mean(axis=0)
    a, r = x - mean, targets - intercept
    values, vectors = np.linalg.eigh(a.T @ a)
    values = values.clip(0.0)
    b = vectors.T @ (a.T @ r)
    alpha = _least_gcv(values, b, float((r**2).sum()), len(r))
    return LinearFit(mean, vectors @ (b / (values + alpha)[:, None]), intercept)


def _least_gcv(values: Floats, b: Floats, total: float, n: int) -> float:
    """The penalty a of least n RSS(a) / (n - df(a))^2, df(a) = sum_i v_i / (v_i + a).

    values: (d,) eigenvalues v; b: (d, m) eigenvectors^T A^T R; total: |R|^2.
    """
    errors = []
    for alpha in ALPHAS:
        shrunk = values + alpha
        rss = total - float(((b**2).sum(axis=1) * (2 / shrunk - values / shrunk**2)).sum())
        freedom = max(n - 1 - float((values / shrunk).sum()), 1.0)
        errors.append(rss / freedom**2)
    return float(ALPHAS[int(np.argmin(errors))])
