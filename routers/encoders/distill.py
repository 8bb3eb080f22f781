"""Distill a static encoder from a sentence-transformers model.

    vector of a token = the model's embedding of the token alone
    vector of a text  = the mean of its tokens' vectors

This needs no data (Model2Vec, github.com/MinishLab/model2vec; its package requires an older transformers than the
engines, while reading a static encoder needs only tokenizers and numpy). With texts, the vectors are then fitted so
that the means approximate the model's embeddings of these texts, in two closed steps: a ridge map of all vectors, and a
ridge correction of each token's vector:

    W = argmin |B E W - M|^2 + r |W|^2          B (n, V) shares of the tokens in each text, E (V, dim) vectors,
    D = argmin |B (E W + D) - M|^2 + s |D|^2    M (n, dim) the model's vectors; result E W + D

Last, a principal component analysis of the texts' (or tokens') vectors keeps `dim` dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.storage import atomic_directory
from routers.encoders.base import Encoder, Progress, Vectors, valid_texts
from routers.encoders.static import FORMAT, META, TOKENIZER, VECTORS, StaticEncoder
from routers.encoders.transformer import SentenceTransformerEncoder
from routers.errors import InvalidEncoder

DEFAULT_DIM = 256
LEAST_TEXTS = 500
"""Fewer texts do not determine a vocabulary of tens of thousands of vectors."""
MAP_RIDGE = 0.01
"""r, as a share of the mean eigenvalue of (B E)' (B E)."""
CORRECTION_RIDGE = 0.1
"""s."""
ITERATIONS = 25
"""Conjugate gradient iterations for D; more do not change the result measurably."""


def distill(
    source: SentenceTransformerEncoder,
    folder: Path | str,
    *,
    dim: int = DEFAULT_DIM,
    texts: Sequence[str] = (),
    targets: Encoder | None = None,
    on_progress: Progress | None = None,
) -> StaticEncoder:
    """Write a static encoder atomically; an existing folder is replaced. Deterministic.

    Args:
        dim: of the new vectors; at most the source's.
        texts: prompts to fit the vectors to, such as those that routers will be trained on. They are not kept.
        targets: encoder of the source's vectors of the texts, such as a cache of it; `None` takes the source.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        InvalidEncoder: `dim` is out of range, too few texts, or the source has no fast tokenizer.
    """
    if not 2 <= dim <= source.dim:
        raise InvalidEncoder(f"dim must lie between 2 and the {source.dim} of encoder {source.name}, got {dim}")
    distinct = list(dict.fromkeys(valid_texts(texts)))
    if distinct and len(distinct) < LEAST_TEXTS:
        raise InvalidEncoder(
            f"{len(distinct)} different texts are too few to fit vectors to: give {LEAST_TEXTS}, or none"
        )
    tokenizer = source.tokenizer_json()
    vectors = source.token_vectors(on_progress)
    vectors -= vectors.mean(axis=0)
    spread = vectors
    if distinct:
        shares = token_shares(tokenizer, distinct)
        vectors = fitted(vectors, shares, (targets or source).encode(distinct))
        spread = np.asarray(shares @ vectors, dtype=np.float32)
    vectors = vectors @ components(spread, dim)
    meta = {
        "format": FORMAT,
        "dim": dim,
        "source": {"name": source.name, "digest": source.digest},
        "texts": len(distinct),
    }
    return _write(Path(folder), vectors, tokenizer, meta)


def token_shares(tokenizer: str, texts: Sequence[str]) -> Any:
    """(n, V) sparse float32: the share of each token in each text."""
    from scipy.sparse import csr_matrix
    from tokenizers import Tokenizer

    reading = Tokenizer.from_str(tokenizer)
    reading.no_truncation()
    reading.no_padding()
    ids = [encoding.ids for encoding in reading.encode_batch_fast(list(texts), add_special_tokens=False)]
    lengths = np.array([len(row) for row in ids])
    values = np.repeat(1.0 / np.maximum(lengths, 1), lengths).astype(np.float32)
    ends = np.append(0, np.cumsum(lengths))
    shares = csr_matrix((values, np.concatenate(ids), ends), shape=(len(ids), reading.get_vocab_size()))
    shares.sum_duplicates()
    return shares


def fitted(vectors: Vectors, shares: Any, targets: Vectors) -> Vectors:
    """(V, dim) vectors E W + D; see the module."""
    means = np.asarray(shares @ vectors)
    gram = means.T @ means
    ridge = MAP_RIDGE * np.trace(gram) / len(gram)
    mapped = vectors @ np.linalg.solve(gram + ridge * np.eye(len(gram), dtype=np.float32), means.T @ targets)
    correction = _ridge_by_rows(shares, targets - shares @ mapped, CORRECTION_RIDGE)
    return np.asarray(mapped + correction, dtype=np.float32)


def components(x: Vectors, dim: int) -> Vectors:
    """(width, dim) the directions of largest variance, with a deterministic sign."""
    if dim == x.shape[1]:
        return np.eye(dim, dtype=np.float32)
    _, directions = np.linalg.eigh(np.cov(x, rowvar=False, dtype=np.float64))
    chosen = directions[:, ::-1][:, :dim]
    signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(dim)])
    return np.asarray(chosen * signs, dtype=np.float32)


def _ridge_by_rows(shares: Any, rest: NDArray[Any], ridge: float) -> NDArray[Any]:
    """argmin_D |B D - R|^2 + s |D|^2 = B' (B B' + s I)^-1 R, each column by conjugate gradients."""
    transposed = shares.T.tocsr()
    solution, residual = np.zeros_like(rest), rest.copy()
    direction, size = residual.copy(), (residual**2).sum(axis=0)
    for _ in range(ITERATIONS):
        image = shares @ (transposed @ direction) + ridge * direction
        step = size / np.maximum((direction * image).sum(axis=0), 1e-20)
        solution += step * direction
        residual -= step * image
        before, size = size, (residual**2).sum(axis=0)
        direction = residual + size / np.maximum(before, 1e-20) * direction
    return np.asarray(transposed @ solution)


def _write(folder: Path, vectors: Vectors, tokenizer: str, meta: dict[str, Any]) -> StaticEncoder:
    from safetensors.numpy import save_file

    with atomic_directory(folder) as staged:
        save_file({"vectors": np.ascontiguousarray(vectors, dtype=np.float32)}, staged / VECTORS)
        (staged / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        (staged / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return StaticEncoder(folder)
