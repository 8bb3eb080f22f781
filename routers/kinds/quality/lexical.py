"""Hashed TF-IDF of words and pairs of words, reduced to a few dense dimensions (latent semantic analysis).

No vocabulary is kept: a term is a bucket, its CRC-32 modulo `BUCKETS`. Fitted are the buckets' weights and the
principal directions of the training texts, so that transforming a text needs numpy alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from routers.numeric.records import ArrayRecord

BUCKETS = 2**15
_ALONE = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts without spaces between words (Thai, Lao, kana, Han): each character is a term, and so is each pair."""
_TERM = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")
_MOST_CHARACTERS = 20_000
"""Longer texts are cut here, so that a decision takes bounded time."""


@dataclass(frozen=True, slots=True, eq=False)
class Lexical(ArrayRecord):
    """Fitted weights and directions.

    idf: (BUCKETS,) float32; components: (BUCKETS, k) float32, orthonormal columns.
    """

    idf: NDArray[np.float32]
    components: NDArray[np.float32]

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, k): the projections of the texts' TF-IDF vectors of length 1; zeros for a text without terms."""
        dense = np.zeros((len(texts), self.components.shape[1]), dtype=np.float32)
        for row, text in enumerate(texts):
            buckets, values = _weighted(text, self.idf)
            dense[row] = values @ self.components[buckets]
        return dense


def fit_lexical(texts: Sequence[str], dims: int, *, seed: int) -> tuple[Lexical, NDArray[np.float32]]:
    """The reduction to at most `dims` directions, and the (n, k) projections of the n training texts."""
    from scipy.sparse import csr_matrix
    from sklearn.utils.extmath import randomized_svd

    counted = [_counts(text) for text in texts]
    seen = np.bincount(np.concatenate([buckets for buckets, _ in counted]), minlength=BUCKETS)
    idf = (np.log((1 + len(texts)) / (1 + seen)) + 1).astype(np.float32)  # smoothed, as scikit-learn does
    rows = [_unit(counts, idf[buckets]) for buckets, counts in counted]
    starts = np.cumsum([0, *(len(buckets) for buckets, _ in counted)])
    columns = np.concatenate([buckets for buckets, _ in counted])
    matrix = csr_matrix((np.concatenate(rows), columns, starts), shape=(len(texts), BUCKETS))
    k = min(dims, len(texts) - 1)
    _, _, directions = randomized_svd(matrix, k, n_iter=2, random_state=seed)
    lexical = Lexical(idf, np.ascontiguousarray(directions.T, dtype=np.float32))
    return lexical, np.asarray(matrix @ lexical.components, dtype=np.float32)


def terms(text: str) -> list[str]:
    """Words (characters in scripts without spaces) and punctuation marks; then each pair of neighbours."""
    words = _TERM.findall(text[:_MOST_CHARACTERS].lower())
    return [*words, *map(" ".join, pairwise(words))]


def _weighted(text: str, idf: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    buckets, counts = _counts(text)
    return buckets, _unit(counts, idf[buckets])


def _counts(text: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The buckets of a text's terms, and how often each occurs."""
    hashes = [zlib.crc32(term.encode("utf-8", "surrogatepass")) % BUCKETS for term in terms(text)]
    buckets, counts = np.unique(np.array(hashes, dtype=np.intp), return_counts=True)
    return buckets, counts.astype(np.intp)


def _unit(counts: NDArray[np.intp], idf: NDArray[np.float32]) -> NDArray[np.float32]:
    """TF-IDF with logarithmic counts, of length 1."""
    values = (1 + np.log(counts)) * idf
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-12), dtype=np.float32)
