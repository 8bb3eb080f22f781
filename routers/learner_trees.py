"""Extremely randomised trees (Geurts et al. 2006) as arrays: grown by scikit-learn, walked by numpy.

All trees stand behind one another in the same arrays. A walk takes all queries down all trees at once, a level a step;
a leaf is its own child, so that who has arrived stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.features import Matrix, Seen
from routers.learners import Category, Floats, centred, residuals

TREES = 100
LEAST_LEAF = 15
FEATURE_SHARE = 0.2
COPIES = 4
CELLS_AT_ONCE = 200_000
"""Most (query, tree) pairs that are walked at once: bounds memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """T trees of N nodes in all, m outputs.

    Attributes:
        roots: (T,) first node of each tree.
        feature: (N,) column that a node asks for; 0 at leaves.
        threshold: (N,) x[feature] <= threshold goes left.
        children: (N, 2) left and right; a leaf has itself twice.
        leaf: (N,) row of `values` of a leaf; 0 elsewhere.
        values: (L, m) means of the leaves.
        depth: most steps from a root to a leaf.
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
        step = max(1, CELLS_AT_ONCE // len(self.roots))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            leaves = self.leaf[self._walk(x[part])]
            total = np.zeros((len(leaves), self.values.shape[1]))
            for tree in range(len(self.roots)):  # tree after tree: no (n, T, m) array
                total += self.values[leaves[:, tree]]
            found[part] = total / len(self.roots)
        return found

    def _walk(self, x: Matrix) -> NDArray[np.int32]:
        """(n, T) the leaf of each row in each tree."""
        nodes = np.repeat(self.roots[None], len(x), axis=0)
        rows = np.arange(len(x))[:, None]
        for _ in range(self.depth):
            right = x[rows, self.feature[nodes]] > self.threshold[nodes]
            nodes = self.children[nodes, right.view(np.int8)]
        return nodes

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything."""
        names = ("roots", "feature", "threshold", "children", "leaf", "values")
        return {**{name: getattr(self, name) for name in names}, "depth": np.array([self.depth])}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Forest:
        """The reverse of `arrays`."""
        names = ("roots", "feature", "threshold", "children", "leaf", "values")
        return cls(**{name: arrays[name] for name in names}, depth=int(arrays["depth"][0]))


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The mean of two forests, which lean on the category estimate each in its own way.

    The first predicts centred scores from all blocks and the category estimates of the m experts, these `COPIES` times
    as likely to be drawn for a split as another column. The second adds to the category estimate what it leaves.
    """

    base: Category
    direct: Forest
    added: Forest

    @classmethod
    def fit(cls, seen: Seen, y: Floats, rng: np.random.Generator) -> Trees:
        """Grow half of the trees for each forest."""
        base, residual = residuals(seen, y, rng)
        estimates = _estimates(base, seen)
        direct = _grown(np.hstack([seen.x, *[estimates] * COPIES]), centred(y), rng)
        return cls(base, _without_copies(direct, seen.x.shape[1], y.shape[1]), _grown(seen.x, residual, rng))

    def predict(self, seen: Seen) -> Floats:
        """(n, m) scores, of which only the differences between experts mean something."""
        direct = self.direct.predict(np.hstack([seen.x, _estimates(self.base, seen)]))
        return 0.5 * (direct + self.base.predict(seen) + self.added.predict(seen.x))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Base and trees."""
        forests = {"direct": self.direct, "added": self.added}
        trees = {f"{which}.{name}": array for which, one in forests.items() for name, array in one.arrays().items()}
        return {**self.base.arrays(), **trees}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Trees:
        """The reverse of `arrays`."""
        return cls(Category.restored(arrays), _forest(arrays, "direct."), _forest(arrays, "added."))


def _grown(x: Matrix, y: Floats, rng: np.random.Generator) -> Forest:
    from sklearn.ensemble import ExtraTreesRegressor

    grown = ExtraTreesRegressor(
        TREES // 2,
        min_samples_leaf=LEAST_LEAF,
        max_features=FEATURE_SHARE,
        random_state=int(rng.integers(2**31)),
    ).fit(x, y)
    return forest_of([tree.tree_ for tree in grown.estimators_], y.shape[1])


def _estimates(base: Category, seen: Seen) -> Matrix:
    return centred(base.predict(seen)).astype(np.float32)


def _without_copies(forest: Forest, width: int, n_experts: int) -> Forest:
    """The same forest over `width` columns and one copy of the estimates."""
    copied = forest.feature >= width
    feature = np.where(copied, width + (forest.feature - width) % n_experts, forest.feature)
    return replace(forest, feature=feature.astype(np.int32))


def _forest(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Forest:
    return Forest.restored({n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)})


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
