"""Texts to vectors: what the engines of embedding models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coe.errors import EngineError, Rejected, Unsupported
from coe.types import Chunk, GenerateRequest, Usage

Vectors = NDArray[np.float32]


def check_generates(request: GenerateRequest, expert: str) -> None:
    """Raises Unsupported if a request wants vectors of a model that generates text."""
    if request.wants == "embedding":
        raise Unsupported(f"{expert!r} generates text and returns no vectors: register an expert of kind 'embedding'")


def token_rows(
    tokenizer: Any, request: GenerateRequest, *, most: int | None, n_ids: int, expert: str
) -> list[list[int]]:
    """The tokens of each input, special tokens included; token ids are taken as they are.

    Args:
        tokenizer: of transformers.
        most: tokens that the model reads of one input; None if there is no limit.
        n_ids: size of the vocabulary.
        expert: name for error messages.

    Raises:
        Rejected: there is no input, or one has no tokens, too many, or one that the vocabulary does not have.
    """
    if not request.inputs:
        raise Rejected(f"{expert!r} is an embedding model: send texts to /v1/embeddings")
    rows = [list(each) if not isinstance(each, str) else [] for each in request.inputs]
    texts = [i for i, each in enumerate(request.inputs) if isinstance(each, str)]
    if texts:
        # Nothing is truncated: a vector of half a text is not that of the text.
        made = tokenizer([request.inputs[i] for i in texts], truncation=False, padding=False, verbose=False)
        for i, ids in zip(texts, made["input_ids"], strict=True):
            rows[i] = ids
    for i, row in enumerate(rows):
        _check(row, f"input[{i}]", most, n_ids, expert)
    return rows


def _check(row: Sequence[int], where: str, most: int | None, n_ids: int, expert: str) -> None:
    if not row:
        raise Rejected(f"{where} has no tokens", param=where)
    if most is not None and len(row) > most:
        raise Rejected(
            f"{where} has {len(row):,} tokens, and {expert!r} reads at most {most:,}: send it in parts",
            code="context_length_exceeded",
            param=where,
        )
    if (wrong := next((token for token in row if not 0 <= token < n_ids), None)) is not None:
        raise Rejected(
            f"{where} has the token id {wrong}, but the vocabulary of {expert!r} has {n_ids:,} tokens: send ids from 0 "
            f"to {n_ids - 1}, made with the tokenizer of this expert",
            param=where,
        )


def vectors_chunk(vectors: Vectors, n_tokens: int) -> Chunk:
    """The one chunk of an answer.

    Args:
        vectors: (n_inputs, dim).
        n_tokens: of all inputs.
    """
    value = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    return Chunk("", finish_reason="stop", usage=Usage(n_tokens, 0), value=value)


def read_vectors(value: bytes | None, n_inputs: int, *, expert: str) -> Vectors:
    """(n_inputs, dim) vectors from the `value` of an answer.

    Raises:
        EngineError: it holds no such vectors, or numbers that are not finite.
    """
    if not value or len(value) % (4 * n_inputs):
        raise EngineError(f"{expert!r} returned no vectors")
    vectors = np.frombuffer(value, dtype="<f4").reshape(n_inputs, -1)
    if not np.isfinite(vectors).all():
        raise EngineError(f"{expert!r} returned a vector with numbers that are not finite")
    return vectors.astype(np.float32, copy=False)


def shortened(vectors: Vectors, dimensions: int | None, *, expert: str) -> Vectors:
    """The first `dimensions` numbers of each vector, scaled to length 1, as models for it are trained (Matryoshka).

    Raises:
        Rejected: the vectors have fewer.
    """
    dim = vectors.shape[1]
    if dimensions is None or dimensions == dim:
        return vectors
    if dimensions > dim:
        raise Rejected(f"dimensions is {dimensions:,}, and the vectors of {expert!r} have {dim:,}", param="dimensions")
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    scaled: Vectors = cut / np.where(lengths == 0, 1, lengths)
    return scaled
