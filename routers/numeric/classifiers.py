"""Embedding -> category: three classifiers with one interface and calibrated probabilities.

A fitted classifier is plain arrays and gives logits (n, M); scikit-learn is needed to fit, not to predict.
Probabilities are softmax(logits / T), with one temperature T chosen on held-out rows (temperature scaling,
arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidSettings, RouterError
from routers.numeric.neighbours import Vectors, top_k
from routers.numeric.records import ArrayRecord
from routers.settings import check_positive, check_range

ClassifierName = Literal["logistic", "linear-svm", "knn"]
Logits = NDArray[np.float64]
Labels = NDArray[np.intp]
MAX_ITERATIONS = 2000
LOG_TEMPERATURE_BOUNDS = (-5.0, 5.0)


class Classifier(Protocol):
    """A fitted classifier of M categories."""

    def logits(self, x: Vectors) -> Logits:
        """(n, M) unnormalised log-probabilities of (n, dim) embeddings."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `restore` needs beside the training embeddings."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Linear(ArrayRecord):
    """logits = x @ coef + intercept: logistic regression, or one-against-the-rest margins of a linear SVM."""

    coef: NDArray[np.float32]  # (dim, M)
    intercept: NDArray[np.float32]  # (M,)

    def logits(self, x: Vectors) -> Logits:
        """(n, M) of (n, dim) embeddings."""
        return np.asarray(x @ self.coef + self.intercept, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """logits = log of the category shares among the k nearest training rows, plus one vote spread by frequency."""

    vectors: Vectors  # (N, dim)
    labels: Labels  # (N,)
    frequency: NDArray[np.float64]  # (M,) share of each category
    k: int

    def logits(self, x: Vectors) -> Logits:
        """(n, M) of (n, dim) embeddings."""
        _, rows = top_k(x, self.vectors, self.k)
        votes = np.zeros((len(x), len(self.frequency)))
        np.add.at(votes, (np.arange(len(x))[:, None], self.labels[rows]), 1.0)
        return np.asarray(np.log((votes + self.frequency) / (self.k + 1)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All but the vectors, which the router stores."""
        return {"labels": self.labels, "frequency": self.frequency, "k": np.array([self.k])}


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """A classifier and its hyperparameters.

    c: inverse strength of the regularisation of `logistic` and `linear-svm`. k: neighbours of `knn`.
    """

    name: ClassifierName = "logistic"
    c: float = 4.0
    k: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(ClassifierName):
            raise InvalidSettings(f"no classifier {self.name!r}; there are: {', '.join(get_args(ClassifierName))}")
        check_positive(self, "c")
        check_range(self, "k", low=1)


def fit_classifier(settings: ClassifierSettings, x: Vectors, y: Labels) -> Classifier:
    """Fit (n, dim) embeddings to (n,) labels 0..M-1, each of which occurs.

    Raises:
        RouterError: `knn` with fewer rows than neighbours.
    """
    n_classes = int(y.max()) + 1
    if settings.name == "knn":
        if len(x) < settings.k:
            raise RouterError(f"k={settings.k} neighbours asked of {len(x)} training queries: lower k or add queries")
        return Neighbours(x, y, np.bincount(y, minlength=n_classes) / len(y), settings.k)
    if n_classes == 1:
        return Linear(np.zeros((x.shape[1], 1), dtype=np.float32), np.zeros(1, dtype=np.float32))
    model = _sklearn_model(settings).fit(x, y)
    coef, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
    if n_classes == 2:  # sklearn keeps one row for two classes: the log-odds of the second
        coef, intercept = np.vstack([np.zeros_like(coef), coef]), np.append(0.0, intercept)
    return Linear(np.ascontiguousarray(coef.T, dtype=np.float32), intercept.astype(np.float32))


def restore(arrays: Mapping[str, NDArray[Any]], vectors: Vectors) -> Classifier:
    """The classifier of `arrays()`; `vectors` are the training embeddings."""
    if "coef" in arrays:
        return Linear.restored(arrays)
    return Neighbours(vectors, arrays["labels"], arrays["frequency"], int(arrays["k"][0]))


def probabilities(logits: Logits, temperature: float) -> NDArray[np.float64]:
    """(n, M) softmax(logits / temperature)."""
    scaled = logits / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


def fit_temperature(logits: Logits, y: Labels) -> float:
    """The temperature of least negative log-likelihood on held-out rows; 1 without rows or with a single category."""
    from scipy.optimize import minimize_scalar

    if not len(y) or logits.shape[1] == 1:
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        top = scaled.max(axis=1)
        log_sum = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((log_sum - scaled[np.arange(len(y)), y]).mean())

    return float(np.exp(minimize_scalar(loss, bounds=LOG_TEMPERATURE_BOUNDS, method="bounded").x))


def _sklearn_model(settings: ClassifierSettings) -> Any:
    if settings.name == "logistic":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=settings.c, max_iter=MAX_ITERATIONS)
    from sklearn.svm import LinearSVC

    return LinearSVC(C=settings.c, max_iter=MAX_ITERATIONS, random_state=settings.seed)
