"""Ridge regression of several targets, fitted by scikit-learn and predicted by numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ALPHAS = np.logspace(-1, 5, 25)
"""Candidate penalties."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """intercept + x @ weights.

    weights: (d, m); intercept: (m,).
    """

    weights: Floats
    intercept: Floats

    def predict(self, x: NDArray[Any]) -> Floats:
        """(n, m) of (n, d)."""
        return np.asarray(self.intercept + x @ self.weights)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Both, by name."""
        return {"weights": self.weights, "intercept": self.intercept}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays`; raises KeyError where one is missing."""
        return cls(arrays["weights"], arrays["intercept"])


def fit_ridge(x: NDArray[Any], targets: Floats) -> LinearFit:
    """Fit (n, m) targets to (n, d) rows with the penalty of least leave-one-out error, one for all targets."""
    from sklearn.linear_model import RidgeCV

    model = RidgeCV(alphas=ALPHAS).fit(x.astype(np.float64), targets)
    return LinearFit(np.ascontiguousarray(model.coef_.T), np.asarray(model.intercept_))
