"""Mean scores of experts on groups of queries, shrunk where groups are small."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]


def shrunk_means(values: _Floats, members: _Floats, shrinkage: float) -> _Floats:
    """(M, m) means of (N, m) values over M groups, shrunk to the overall mean with the weight of `shrinkage` queries.

    Args:
        members: (N, M) membership of each query in each group, >= 0. An empty group gets the overall mean.
    """
    overall = values.mean(axis=0)
    counts = members.sum(axis=0)[:, None] + shrinkage
    means = (members.T @ values + shrinkage * overall) / np.where(counts > 0, counts, 1.0)
    return np.where(counts > 0, means, overall)


def one_hot(groups: NDArray[np.intp], n_groups: int) -> _Floats:
    """(N, M) memberships of queries in one group each."""
    return np.asarray(groups[:, None] == np.arange(n_groups), dtype=np.float64)
