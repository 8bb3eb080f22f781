"""k-means over embeddings."""

from __future__ import annotations

import numpy as np

from routers.errors import RouterError
from routers.numeric.neighbours import Vectors


def kmeans(vectors: Vectors, n_clusters: int, seed: int, *, starts: int = 1) -> Vectors:
    """(C, dim) centres of (N, dim) unit vectors, scaled to length 1 for comparison by cosine.

    C is `n_clusters`, or the number of different vectors where that is less. scikit-learn's k-means++.

    Args:
        starts: number of initialisations; the best is kept. One is enough for many clusters, few clusters need more.

    Raises:
        RouterError: fewer rows than clusters.
    """
    from sklearn.cluster import KMeans

    if len(vectors) < n_clusters:
        raise RouterError(f"{n_clusters} clusters asked of {len(vectors)} training queries: lower n_clusters")
    n_different = len(np.unique(vectors, axis=0))
    model = KMeans(min(n_clusters, n_different), n_init=starts, random_state=seed).fit(vectors)
    centres = np.asarray(model.cluster_centers_, dtype=np.float32)
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    return np.asarray(centres / np.where(lengths > 0, lengths, 1.0), dtype=np.float32)
