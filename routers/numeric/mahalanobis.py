"""Out-of-distribution score of an embedding: its Mahalanobis distance to the training embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from routers.numeric.neighbours import Vectors
from routers.numeric.records import ArrayRecord

RIDGE = 0.01
"""Added to every variance, as a share of their mean: keeps directions of no variance from dominating."""


@dataclass(frozen=True, slots=True, eq=False)
class Mahalanobis(ArrayRecord):
    """d(x) = sqrt((x - mean)^T (S + r I)^-1 (x - mean)), with S the covariance of the training embeddings.

    After the detector of arXiv 1807.03888, with one mean for all classes. A prompt that differs from the training
    prompts only in directions in which they hardly vary is near to them by cosine and far by this distance.

    mean: (dim,); whitening: (dim, dim) W with W W^T = (S + r I)^-1, both float32.
    """

    mean: NDArray[np.float32]
    whitening: NDArray[np.float32]

    @classmethod
    def of(cls, x: Vectors) -> Self:
        """The distance to (n, dim) embeddings, n >= 2; r is 0.01 of the mean variance."""
        mean = x.mean(axis=0, dtype=np.float64)
        values, directions = np.linalg.eigh(np.cov(x, rowvar=False, dtype=np.float64).reshape(len(mean), -1))
        variances = values.clip(0.0) + max(RIDGE * float(values.mean()), np.finfo(np.float32).eps)
        return cls(mean.astype(np.float32), (directions / np.sqrt(variances)).astype(np.float32))

    def distance(self, x: Vectors) -> NDArray[np.float64]:
        """(n,) of (n, dim) embeddings."""
        whitened = (x - self.mean).astype(np.float64) @ self.whitening
        return np.asarray(np.sqrt(np.einsum("nd,nd->n", whitened, whitened)))
