"""Classifier outputs on held-out queries, for calibration and abstention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.numeric.abstention import Doubt, normalised_entropy
from routers.numeric.classifiers import (
    ClassifierSettings,
    Labels,
    Logits,
    fit_classifier,
    fit_temperature,
    probabilities,
)
from routers.numeric.folds import stratified_folds
from routers.numeric.neighbours import Vectors, nearest_distance

N_FOLDS = 5
N_GROUPS = 3
"""Groups of categories that are left out in turn, in place of out-of-distribution prompts."""
LEAST_MEMBERSHIP = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """n rows, scored by classifiers that were not trained on them.

    rows: (n,) of the training table; logits: (n, M); distance: (n,) to the nearest row of the other folds.
    """

    rows: NDArray[np.intp]
    logits: Logits
    distance: NDArray[np.float64]
    temperature: float

    def memberships(self, y: Labels) -> NDArray[np.float64]:
        """(N, M) membership of each training row in each category: its probabilities; its label if never held out.

        At least `LEAST_MEMBERSHIP`, so that every category has a positive share.
        """
        members = np.zeros((len(y), self.logits.shape[1]))
        members[np.arange(len(y)), y] = 1.0
        members[self.rows] = np.maximum(probabilities(self.logits, self.temperature), LEAST_MEMBERSHIP)
        return members

    def doubt(self) -> Doubt:
        """The entropy and distance of each row."""
        return Doubt(normalised_entropy(probabilities(self.logits, self.temperature)), self.distance)


def category_folds(y: Labels, rng: np.random.Generator) -> Labels:
    """(n,) fold of each row, stratified by its label 0..M-1; -1, never held out, for a label of one row."""
    folds, counts = np.full(len(y), -1, dtype=np.intp), np.bincount(y)
    rows = np.flatnonzero(counts[y] > 1)
    if len(rows):  # at most as many folds as the largest label has rows, so that no fold holds all rows of a label
        folds[rows] = stratified_folds(y[rows], min(N_FOLDS, int(counts.max())), seed=int(rng.integers(2**31)))
    return folds


def cross_fit(settings: ClassifierSettings, x: Vectors, y: Labels, rng: np.random.Generator) -> HeldOut:
    """Five-fold cross-fitting of (n, dim) embeddings to (n,) labels, and the temperature that calibrates it."""
    folds = category_folds(y, rng)
    logits = np.zeros((len(y), int(y.max()) + 1))
    distance = np.zeros(len(y))
    for fold in np.unique(folds[folds >= 0]):
        inner, outer = folds != fold, folds == fold
        logits[outer] = fit_classifier(_fitting(settings, inner), x[inner], y[inner]).logits(x[outer])
        distance[outer] = nearest_distance(x[outer], x[inner])
    rows = np.flatnonzero(folds >= 0)
    return HeldOut(rows, logits[rows], distance[rows], fit_temperature(logits[rows], y[rows]))


def left_out_categories(
    settings: ClassifierSettings, x: Vectors, y: Labels, temperature: float, rng: np.random.Generator
) -> Doubt:
    """Entropy and distance of queries whose category the classifier was not trained on, as out-of-distribution prompts.

    Empty where there are fewer than two categories.
    """
    n_classes = int(y.max()) + 1
    group_of = rng.permutation(n_classes) % N_GROUPS
    parts = []
    for group in range(min(N_GROUPS, n_classes) if n_classes > 1 else 0):
        left_out = group_of[y] == group
        _, relabelled = np.unique(y[~left_out], return_inverse=True)
        model = fit_classifier(_fitting(settings, ~left_out), x[~left_out], relabelled)
        p = probabilities(model.logits(x[left_out]), temperature)
        # Normalised by the categories that this classifier knows, so that entropies compare with the full one's.
        parts.append(Doubt(normalised_entropy(p), nearest_distance(x[left_out], x[~left_out])))
    return _joined(parts)


def _fitting(settings: ClassifierSettings, rows: NDArray[Any]) -> ClassifierSettings:
    """The same settings with at most as many neighbours as rows."""
    return replace(settings, k=min(settings.k, int(rows.sum())))


def _joined(parts: list[Doubt]) -> Doubt:
    if not parts:
        return Doubt(np.zeros(0), np.zeros(0))
    return Doubt(np.concatenate([part.entropy for part in parts]), np.concatenate([part.distance for part in parts]))
