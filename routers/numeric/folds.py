"""Stratified folds: rows of every label spread evenly over the folds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidOutcomes


def stratified_folds(labels: Sequence[str] | NDArray[Any], n_folds: int = 5, *, seed: int = 0) -> NDArray[np.int64]:
    """(n,) folds 0 .. n_folds - 1 of nearly equal size for (n,) labels, by scikit-learn's StratifiedKFold.

    A label with fewer rows than folds has at most one in each fold. Where every label is so rare, folds are random:
    StratifiedKFold refuses such labels.

    Raises:
        InvalidOutcomes: fewer rows than folds, or fewer than two folds.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if n_folds < 2 or n_folds > len(labels):
        raise InvalidOutcomes(f"{len(labels)} rows cannot be split into {n_folds} folds")
    _, y, counts = np.unique(list(labels), return_inverse=True, return_counts=True)
    splitter = (StratifiedKFold if counts.max() >= n_folds else KFold)(n_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(y), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about labels with fewer rows than folds
        for fold, (_, rows) in enumerate(splitter.split(y, y)):
            folds[rows] = fold
    return folds
