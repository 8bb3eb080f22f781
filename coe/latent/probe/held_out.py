"""Predictions of labels for rows that the classifier was not fitted on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from coe.errors import TaskError
from coe.latent.states import Floats

STRENGTH: Final = 100.0
"""Inverse of the L2 penalty, for rows of unit length on average."""
MOST_N_GRAMS: Final = 20_000
MOST_LABELS: Final = 200
_MOST_STEPS: Final = 500
_SPREAD: Final = 1e-4
"""Added to each deviation, so that a constant dimension stays finite."""

Labels = NDArray[np.int64]
Folds = NDArray[np.int64]
"""(n,) fold of each row."""
Right = NDArray[np.bool_]
"""(n,) whether each row was predicted right."""


@dataclass(frozen=True, eq=False, slots=True)
class Standardising:
    """Centres and scales each dimension: (x - mean) / (deviation + 1e-4)."""

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, values: Floats) -> Self:
        """By the mean and deviation, (d,), of (n, d) training rows."""
        return cls(values.mean(0), values.std(0))

    def __call__(self, values: Floats) -> Floats:
        """(n, d) rows, standardised."""
        scaled: Floats = (values - self.mean) / (self.deviation + _SPREAD)
        return scaled


def grouped_folds(y: Labels, groups: Sequence[str], n_folds: int, seed: int) -> Folds:
    """Folds with nearly the same shares of labels, by scikit-learn's StratifiedGroupKFold; a group is in one fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    _, numbers = np.unique(list(groups), return_inverse=True)
    folds = np.empty(len(y), np.int64)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for fold, (_, rows) in enumerate(splitter.split(y, y, numbers)):
        folds[rows] = fold
    return folds


def check_groups(labels: Sequence[str], groups: Sequence[str], n_folds: int) -> None:
    """Raises TaskError if there is one label only, too many, or one with fewer groups than folds."""
    counts = Counter(label for label, _ in set(zip(labels, groups, strict=True)))
    if len(counts) < 2:
        raise TaskError(f"all rows have the label {labels[0]!r}: a probe tells labels apart, and needs at least two")
    if len(counts) > MOST_LABELS:
        raise TaskError(f"the rows have {len(counts):,} labels, more than {MOST_LABELS}: a label is a class")
    few = sorted((n, label) for label, n in counts.items() if n < n_folds)
    if not few:
        return
    some = ", ".join(f"{label!r} has {n}" for n, label in few[:5])
    more = f", and {len(few) - 5} more labels" if len(few) > 5 else ""
    fewer = f", or use --folds {few[0][0]}" if few[0][0] > 1 else ""
    raise TaskError(
        f"with {n_folds} folds, each label needs rows of at least {n_folds} different texts (words, groups): {some}"
        f"{more}. Add rows, leave these labels out{fewer}"
    )


def from_states(states: Floats, y: Labels, folds: Folds) -> Right:
    """By multinomial logistic regression on (n, d) states, standardised on the training rows."""

    def fitted(train: NDArray[Any], test: NDArray[Any]) -> tuple[Any, Any]:
        standardised = Standardising.of(states[train])
        x, new = standardised(states[train]), standardised(states[test])
        scale = np.sqrt(x.shape[1])  # rows have unit length on average, whatever the width
        return _narrowed(x / scale, new / scale)

    return _held_out(fitted, y, folds)


def from_texts(texts: Sequence[str], y: Labels, folds: Folds) -> Right:
    """By the same on the TF-IDF of character n-grams, 1 to 4 characters within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    def fitted(train: NDArray[Any], test: NDArray[Any]) -> tuple[Any, Any]:
        vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=MOST_N_GRAMS
        )
        return vectorizer.fit_transform([texts[i] for i in train]), vectorizer.transform([texts[i] for i in test])

    return _held_out(fitted, y, folds)


def _narrowed(x: Any, new: Any) -> tuple[Any, Any]:
    """The rows in coordinates of the space that the training rows span: the same regression, with fewer weights."""
    if x.shape[0] >= x.shape[1]:
        return x, new
    basis = np.linalg.svd(x, full_matrices=False)[2].T
    return x @ basis, new @ basis


def _held_out(features: Callable[[NDArray[Any], NDArray[Any]], tuple[Any, Any]], y: Labels, folds: Folds) -> Right:
    from sklearn.linear_model import LogisticRegression

    right = np.zeros(len(y), np.bool_)
    for fold in np.unique(folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        x, new = features(train, test)
        with _unfinished():
            model = LogisticRegression(C=STRENGTH, max_iter=_MOST_STEPS).fit(x, y[train])
        right[test] = model.predict(new) == y[test]
    return right


@contextmanager
def _unfinished() -> Iterator[None]:
    """Without scikit-learn's warning that the steps are used up: then the weights are nearly the best."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
