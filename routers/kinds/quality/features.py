"""Features of the `quality` router: blocks of columns, each reduced and scaled on training rows.

Blocks: the embedding; lexical (`routers.kinds.quality.lexical`); surface (`routers.kinds.quality.surface`); signals
(`Query.features` by name); and the probabilities of the table's categories, from a classifier over the blocks above,
one for each column of labels. Training rows get the probabilities of classifiers that were not trained on them, like
new queries. Each block's columns have a total variance of 1 over the training rows, so that no block dominates; trees
are not affected by scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.fitted import under
from routers.kinds.quality.lexical import Lexical, fit_lexical
from routers.kinds.quality.surface import surface
from routers.numeric.classifiers import (
    ClassifierSettings,
    Labels,
    Linear,
    fit_classifier,
    fit_temperature,
    probabilities,
)
from routers.numeric.cross_fit import category_folds

DIMS = 96
"""Most dimensions of a reduced block."""
CLASSIFIER = ClassifierSettings("logistic", c=2.0)
CATEGORY_WEIGHT = 2.0
"""Scale of the probabilities, which matter more than their few columns suggest in learners that use distances."""
_OUTLIER = 5.0
"""Columns are clipped at this many standard deviations."""

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Standardised columns, reduced to k of them: clip((x - mean) / scale) @ weights.

    mean, scale: (d,); weights: (d, k).
    """

    mean: Matrix
    scale: Matrix
    weights: Matrix

    def transform(self, x: NDArray[Any]) -> Matrix:
        """(n, k) of (n, d)."""
        z = ((np.asarray(x, dtype=np.float32) - self.mean) / self.scale).clip(-_OUTLIER, _OUTLIER)
        return np.asarray(z @ self.weights, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Inputs of all blocks for n queries: texts, embeddings (n, dim), and signals name -> (n, d)."""

    texts: Sequence[str]
    embeddings: Matrix
    signals: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True, eq=False)
class Categories:
    """The M names of one column of labels, and its classifier over the other blocks."""

    names: tuple[str, ...]
    classifier: Linear
    temperature: float

    def probabilities(self, x: Matrix) -> NDArray[np.float64]:
        """(n, M) of the (n, d) other blocks."""
        return probabilities(self.classifier.logits(x), self.temperature)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Features of n queries, as learners read them.

    x: (n, d) all blocks; p: (n, M) probabilities of the categories of all columns of labels, divided by the number of
    columns so that a row has sum 1; `None` where there are none.
    """

    x: Matrix
    p: NDArray[np.float64] | None

    def __getitem__(self, rows: NDArray[Any]) -> Seen:
        return Seen(self.x[rows], None if self.p is None else self.p[rows])

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """All fitted blocks; `lexical` is `None` and `categories` empty where they are not used."""

    blocks: Mapping[str, Block]
    lexical: Lexical | None
    categories: tuple[Categories, ...]

    def transform(self, queries: Texts) -> Seen:
        """Features of n queries."""
        x = np.hstack([block.transform(_raw(name, queries, self.lexical)) for name, block in self.blocks.items()])
        return _seen(x, [categories.probabilities(x) for categories in self.categories])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array; names contain no further dot."""
        found = {
            f"block.{name}.{part}": getattr(block, part)
            for name, block in self.blocks.items()
            for part in ("mean", "scale", "weights")
        }
        if self.lexical is not None:
            found |= {f"lexical.{name}": array for name, array in self.lexical.arrays().items()}
        for i, categories in enumerate(self.categories):
            found |= {f"classifier.{i}.{name}": array for name, array in categories.classifier.arrays().items()}
        return found

    def settings(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        categories = [{"names": list(one.names), "temperature": one.temperature} for one in self.categories]
        return {"blocks": list(self.blocks), "categories": categories}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Self:
        """What `arrays()` and `settings()` were taken from. Raises KeyError where something is missing."""
        blocks = {
            name: Block(*(arrays[f"block.{name}.{part}"] for part in ("mean", "scale", "weights")))
            for name in settings["blocks"]
        }
        lexical = Lexical.restored(under("lexical.", arrays)) if "lexical" in blocks else None
        categories = tuple(
            Categories(
                tuple(known["names"]),
                Linear.restored(under(f"classifier.{i}.", arrays)),
                known["temperature"],
            )
            for i, known in enumerate(settings["categories"])
        )
        return cls(blocks, lexical, categories)


def fit_features(
    queries: Texts,
    labels: Sequence[Sequence[str]],
    *,
    lexical: bool,
    surface_marks: bool,
    seed: int,
) -> tuple[Features, Seen]:
    """Fit the blocks on n training queries; returns them and the features of these queries.

    Args:
        labels: columns of n categories each; a column of one category, or of none with two rows, is ignored.
    """
    words, reduced = fit_lexical(queries.texts, DIMS, seed=seed) if lexical else (None, None)
    raw = {"embedding": queries.embeddings}
    if reduced is not None:
        raw["lexical"] = reduced
    if surface_marks:
        raw["surface"] = np.asarray(surface(queries.texts), dtype=np.float32)
    raw |= {f"signal.{name}": np.asarray(values, dtype=np.float32) for name, values in queries.signals.items()}
    blocks = {name: _fit_block(values, one_scale=name == "embedding") for name, values in raw.items()}
    x = np.hstack([block.transform(raw[name]) for name, block in blocks.items()])
    fitted = [_fit_categories(x, column, seed) for column in labels if _is_learnable(column)]
    return Features(blocks, words, tuple(one for one, _ in fitted)), _seen(x, [p for _, p in fitted])


def _is_learnable(labels: Sequence[str]) -> bool:
    """Whether there are two categories, and one of them has two rows: one to fit on and one to hold out."""
    return 1 < len(set(labels)) < len(labels)


def _raw(name: str, queries: Texts, lexical: Lexical | None) -> NDArray[Any]:
    if name == "embedding":
        return queries.embeddings
    if name == "lexical" and lexical is not None:
        return lexical.transform(queries.texts)
    if name == "surface":
        return surface(queries.texts)
    return queries.signals[name.removeprefix("signal.")]


def _seen(x: Matrix, columns: Sequence[NDArray[np.float64]]) -> Seen:
    if not columns:
        return Seen(x, None)
    p = np.hstack(columns)
    return Seen(np.hstack([x, (CATEGORY_WEIGHT * p).astype(np.float32)]), p / len(columns))


def _fit_block(values: NDArray[Any], *, one_scale: bool) -> Block:
    """Standardise (n, d) columns, project them to `DIMS` principal axes where there are more, scale the block.

    one_scale: one standard deviation for all columns, for embeddings.
    """
    mean, scale = values.mean(axis=0), values.std(axis=0)
    if one_scale:
        scale = np.full_like(scale, np.sqrt((scale**2).mean()))
    scale = np.where(scale > 1e-6, scale, 1.0)
    z = ((values - mean) / scale).clip(-_OUTLIER, _OUTLIER).astype(np.float64)
    weights = np.eye(z.shape[1])
    if z.shape[1] > DIMS:
        _, axes = np.linalg.eigh(z.T @ z)
        weights = axes[:, ::-1][:, :DIMS]
    total = np.sqrt((z @ weights).var(axis=0).sum())
    weights = weights / max(float(total), 1e-6)
    return Block(*(np.ascontiguousarray(part, dtype=np.float32) for part in (mean, scale, weights)))


def _fit_categories(x: Matrix, labels: Sequence[str], seed: int) -> tuple[Categories, NDArray[np.float64]]:
    """The classifier of all rows, and cross-fitted probabilities of each row."""
    names, found = np.unique(np.array(labels, dtype=object), return_inverse=True)
    y: Labels = np.asarray(found, dtype=np.intp)
    logits = _cross_fitted_logits(x, y, np.random.default_rng(seed))
    temperature = fit_temperature(logits, y)
    classifier = fit_classifier(CLASSIFIER, x, y)
    if not isinstance(classifier, Linear):
        raise TypeError(f"a {CLASSIFIER.name} classifier is linear")
    return Categories(tuple(names.tolist()), classifier, temperature), probabilities(logits, temperature)


def _cross_fitted_logits(x: Matrix, y: Labels, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n, M) held-out logits; rows of a category of one row form a fold of their own."""
    folds, n_classes = category_folds(y, rng), int(y.max()) + 1
    logits = np.full((len(y), n_classes), 0.0)
    for fold in np.unique(folds):
        inner, outer = folds != fold, folds == fold
        classes, inner_y = np.unique(y[inner], return_inverse=True)
        found = fit_classifier(CLASSIFIER, x[inner], inner_y).logits(x[outer])
        rows = np.full((int(outer.sum()), n_classes), found.min(initial=0.0) - 1.0)
        rows[:, classes] = found
        logits[outer] = rows
    return logits
