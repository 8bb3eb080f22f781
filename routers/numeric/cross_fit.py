"""What a classifier says of queries it was not trained on: the ground for calibration and for abstention."""

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
from routers.numeric.neighbours import Vectors, nearest_distance

N_FOLDS = 5
N_GROUPS = 3
"""Groups of categories that are left out, one after the other, to play the foreign prompts."""
LEAST_MEMBERSHIP = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """n rows as seen by classifiers that were not trained on them.

    rows: (n,) of the training table; logits: (n, M); distance: (n,) to the nearest row of the other folds.
    """

    rows: NDArray[np.intp]
    logits: Logits
    distance: NDArray[np.float64]
    temperature: float

    def memberships(self, y: Labels) -> NDArray[np.float64]:
        """(N, M) how much each training row belongs to each category: its probabilities; its label if never held out.

        Never quite 0 over all rows, so that every category has a share.
        """
        members = np.zeros((len(y), self.logits.shape[1]))
        members[np.arange(len(y)), y] = 1.0
        members[self.rows] = np.maximum(probabilities(self.logits, self.temperature), LEAST_MEMBERSHIP)
        return members

    def doubt(self) -> Doubt:
        """The entropy and distance of each row."""
        return Doubt(normalised_entropy(probabilities(self.logits, self.temperature)), self.distance)


def stratified_folds(y: Labels, rng: np.random.Generator) -> Labels:
    """(n,) fold 0..4 of each row, dealt out within each category; -1, never held out, for a category of one row."""
    folds = np.full(len(y), -1, dtype=np.intp)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        if len(rows) > 1:
            folds[rows] = (np.arange(len(rows)) + rng.integers(N_FOLDS)) % N_FOLDS
    return folds


def cross_fit(settings: ClassifierSettings, x: Vectors, y: Labels, rng: np.random.Generator) -> HeldOut:
    """Five-fold cross-fitting of (n, dim) embeddings to (n,) labels, and the temperature that calibrates it."""
    folds = stratified_folds(y, rng)
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
    """How queries look to classifiers that know nothing of their category: stand-ins for foreign prompts.

    Empty where there are fewer than two categories.
    """
    n_classes = int(y.max()) + 1
    group_of = rng.permutation(n_classes) % N_GROUPS
    parts = []
    for group in range(min(N_GROUPS, n_classes) if n_classes > 1 else 0):
        foreign = group_of[y] == group
        _, relabelled = np.unique(y[~foreign], return_inverse=True)
        model = fit_classifier(_fitting(settings, ~foreign), x[~foreign], relabelled)
        p = probabilities(model.logits(x[foreign]), temperature)
        # Normalised by the categories that this classifier knows, so that entropies compare with the full one's.
        parts.append(Doubt(normalised_entropy(p), nearest_distance(x[foreign], x[~foreign])))
    return _joined(parts)


def _fitting(settings: ClassifierSettings, rows: NDArray[Any]) -> ClassifierSettings:
    """The same settings with no more neighbours than there are rows."""
    return replace(settings, k=min(settings.k, int(rows.sum())))


def _joined(parts: list[Doubt]) -> Doubt:
    if not parts:
        return Doubt(np.zeros(0), np.zeros(0))
    return Doubt(np.concatenate([part.entropy for part in parts]), np.concatenate([part.distance for part in parts]))
