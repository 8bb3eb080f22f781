"""Extremely randomised trees (Geurts et al. 2006) as arrays: fitted by scikit-learn, evaluated by numpy.

Three learners: without the category estimate, with it as further columns, and fitted to its residuals. Which of them is
best differs between tables; the stack weights them.

All trees are concatenated in the same arrays. One step moves all queries down one level of all trees at once; a leaf is
its own child. For a single query this is faster than scikit-learn's own predict, and artifacts hold plain arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.kinds.quality.features import Matrix, Seen
from routers.kinds.quality.learners import Category, Floats, centred, residuals

TREES = 50
LEAST_LEAF = 15
FEATURE_SHARE = 0.2
COPIES = 4
CELLS_AT_ONCE = 500_000
"""Largest number of leaf values gathered at once: bounds memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """T trees of N nodes in all, m outputs.

    Attributes:
        roots: (T,) first node of each tree.
        feature: (N,) column that a node compares; 0 at leaves.
        threshold: (N,) x[feature] <= threshold goes left.
        children: (N, 2) left and right; a leaf has itself twice.
        leaf: (N,) row of `values` of a leaf; 0 elsewhere.
        values: (L, m) means of the leaves.
        depth: largest number of steps from a root to a leaf.
    """

    roots: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: Floats
    children: NDArray[np.int32]
    leaf: NDArray[np.int32]
    values: NDArray[np.float32]
    depth: int

    def predict(self, x: Matrix) -> Floats:
        """(n, m) means over the trees for (n, d) rows."""
        found = np.empty((len(x), self.values.shape[1]))
        step = max(1, CELLS_AT_ONCE // (len(self.roots) * self.values.shape[1]))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            leaves = self.values[self.leaf[self._walk(x[part])]]  # (rows, T, m)
            found[part] = leaves.mean(axis=1, dtype=np.float64)
        return found

    def _walk(self, x: Matrix) -> NDArray[np.intp]:
        """(n, T) the leaf of each row in each tree."""
        nodes = np.repeat(self.roots[None].astype(np.intp), len(x), axis=0)
        cells, children = np.ascontiguousarray(x).ravel(), self.children.ravel()  # `take` is faster than fancy indexing
        first = np.arange(len(x))[:, None] * x.shape[1]
        for _ in range(self.depth):
            right = cells.take(first + self.feature.take(nodes)) > self.threshold.take(nodes)
            nodes = children.take(2 * nodes + right).astype(np.intp)
        return nodes

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything."""
        names = ("roots", "feature", "threshold", "children", "leaf", "values")
        return {**{name: getattr(self, name) for name in names}, "depth": np.array([self.depth])}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays`."""
        names = ("roots", "feature", "threshold", "children", "leaf", "values")
        return cls(**{name: arrays[name] for name in names}, depth=int(arrays["depth"][0]))


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """Trees that predict the centred scores; the mean over experts comes from the category estimate."""

    base: Category
    forest: Forest

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Self:
        """Fit to the centred scores."""
        return cls(Category.fit(seen, y, rng), _grown(seen.x, centred(y), rng))

    def predict(self, seen: Seen) -> Floats:
        """(n, m) scores."""
        return np.asarray(self.forest.predict(seen.x) + self.base.predict(seen).mean(axis=1, keepdims=True))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Base and trees."""
        return {**self.base.arrays(), **self.forest.arrays()}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays`."""
        return cls(Category.restored(arrays), Forest.restored(arrays))


class GuidedTrees(Trees):
    """Trees that also have the category estimates of the m experts as columns.

    These are `COPIES` times as likely to be sampled for a split as another column.
    """

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Self:
        """Fit with copies of the columns, then map the copies back to one."""
        base = Category.fit(seen, y, rng)
        forest = _grown(np.hstack([seen.x, *[_estimates(base, seen)] * COPIES]), centred(y), rng)
        return cls(base, _without_copies(forest, seen.x.shape[1], y.shape[1]))

    def predict(self, seen: Seen) -> Floats:
        """(n, m) scores."""
        found = self.forest.predict(np.hstack([seen.x, _estimates(self.base, seen)]))
        return np.asarray(found + self.base.predict(seen).mean(axis=1, keepdims=True))


class ResidualTrees(Trees):
    """Trees fitted to the residuals of the category estimate, and added to it."""

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Self:
        """Fit to the residuals."""
        base, residual = residuals(seen, y, rng)
        return cls(base, _grown(seen.x, residual, rng))

    def predict(self, seen: Seen) -> Floats:
        """(n, m) scores."""
        return self.forest.predict(seen.x) + self.base.predict(seen)


def _grown(x: Matrix, y: Floats, rng: np.random.Generator) -> Forest:
    from sklearn.ensemble import ExtraTreesRegressor

    seed = int(rng.integers(2**31))
    model = ExtraTreesRegressor(TREES, min_samples_leaf=LEAST_LEAF, max_features=FEATURE_SHARE, random_state=seed).fit(
        x, y
    )
    return forest_of([tree.tree_ for tree in model.estimators_], y.shape[1])


def _estimates(base: Category, seen: Seen) -> Matrix:
    return centred(base.predict(seen)).astype(np.float32)


def _without_copies(forest: Forest, width: int, n_experts: int) -> Forest:
    """The same forest over `width` columns and one copy of the estimates."""
    copied = forest.feature >= width
    feature = np.where(copied, width + (forest.feature - width) % n_experts, forest.feature)
    return replace(forest, feature=feature.astype(np.int32))


def forest_of(trees: list[Any], n_outputs: int) -> Forest:
    """The arrays of fitted scikit-learn trees (`estimator.tree_`)."""
    counts = [tree.node_count for tree in trees]
    roots = np.cumsum([0, *counts[:-1]])
    left = np.concatenate(
        [tree.children_left + root * (tree.children_left >= 0) for tree, root in zip(trees, roots, strict=True)]
    )
    right = np.concatenate(
        [tree.children_right + root * (tree.children_right >= 0) for tree, root in zip(trees, roots, strict=True)]
    )
    leaves = left < 0
    itself = np.arange(len(left))
    values = np.concatenate([tree.value.reshape(tree.node_count, n_outputs) for tree in trees])
    leaf = np.zeros(len(left), dtype=np.int32)
    leaf[leaves] = np.arange(int(leaves.sum()))
    return Forest(
        roots=roots.astype(np.int32),
        feature=np.where(leaves, 0, np.concatenate([tree.feature for tree in trees])).astype(np.int32),
        threshold=np.where(leaves, 0.0, np.concatenate([tree.threshold for tree in trees])),
        children=np.stack([np.where(leaves, itself, left), np.where(leaves, itself, right)], axis=1).astype(np.int32),
        leaf=leaf,
        values=values[leaves].astype(np.float32),
        depth=max(tree.max_depth for tree in trees),
    )
