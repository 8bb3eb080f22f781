"""Ridge regression of several targets, with the penalty of least generalised cross-validation error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ALPHAS = np.logspace(-1, 5, 25)
"""Penalties to choose from."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """intercept + (x - mean) @ weights.

    mean: (d,); weights: (d, m); intercept: (m,).
    """

    mean: Floats
    weights: Floats
    intercept: Floats

    def predict(self, x: NDArray[Any]) -> Floats:
        """(n, m) of (n, d)."""
        return np.asarray(self.intercept + (x - self.mean) @ self.weights)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything."""
        return {"mean": self.mean, "weights": self.weights, "intercept": self.intercept}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays`; raises KeyError where one is missing."""
        return cls(arrays["mean"], arrays["weights"], arrays["intercept"])


def fit_line(x: NDArray[Any], targets: Floats) -> Line:
    """Solve the normal equations of (n, d) rows and (n, m) targets by their eigenvalues, once for all penalties."""
    mean, intercept = x.mean(axis=0, dtype=np.float64), targets.mean(axis=0)
    a, r = x - mean, targets - intercept
    values, vectors = np.linalg.eigh(a.T @ a)
    values = values.clip(0.0)
    b = vectors.T @ (a.T @ r)
    alpha = _least_gcv(values, b, float((r**2).sum()), len(r))
    return Line(mean, vectors @ (b / (values + alpha)[:, None]), intercept)


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
