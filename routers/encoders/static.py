"""StaticEncoder: the mean of a text's token vectors. Hundreds of times faster than the model it is distilled from.

`routers.encoders.distill` writes the folder: `static.json`, `vectors.safetensors` (one row a token), `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from registry.storage import sha256_file
from routers.encoders.base import Vectors, valid_texts
from routers.errors import InvalidEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

META, VECTORS, TOKENIZER = "static.json", "vectors.safetensors", "tokenizer.json"
FORMAT = 1
_FEW = 4096
"""Texts of at most this many tokens are summed directly; longer ones by distinct tokens and their counts."""


class StaticEncoder:
    """Mean of token vectors, normalised to length 1. Texts of any length are read whole; thread-safe.

    A text without tokens is encoded as the first unit vector.

    Raises:
        InvalidEncoder: the folder is not a static encoder's, or a file in it is missing or damaged.
    """

    max_tokens = None

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / META).read_text(encoding="utf-8"))
            self.dim = int(self.meta["dim"])
            found = self.meta["format"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidEncoder(f"{self.folder} is not a static encoder: its {META} is missing or damaged") from error
        if found != FORMAT:
            raise InvalidEncoder(f"{self.folder / META} has format {found}, this version reads {FORMAT}: distill again")

    @cached_property
    def digest(self) -> str:
        """`sha256:...` over vectors and tokenizer; independent of the folder and of the metadata."""
        try:
            text = "\n".join(f"{name} {sha256_file(self.folder / name)}" for name in (VECTORS, TOKENIZER))
        except OSError as error:
            raise InvalidEncoder(f"the static encoder in {self.folder} lacks a file: {error}") from error
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        tokenizer, vectors = self._loaded
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, encoding in zip(
            rows, tokenizer.encode_batch_fast(valid_texts(texts), add_special_tokens=False), strict=True
        ):
            row[:] = _sum(vectors, encoding.ids)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows[lengths[:, 0] == 0, 0] = 1.0
        return np.asarray(rows / np.where(lengths, lengths, 1.0), dtype=np.float32)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """All False: texts are read whole."""
        return np.zeros(len(texts), dtype=bool)

    @cached_property
    def _loaded(self) -> tuple[Tokenizer, Vectors]:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        try:
            vectors = load_file(self.folder / VECTORS)["vectors"]
            tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER))
        except Exception as error:  # safetensors and tokenizers raise their own, the latter a bare Exception
            raise InvalidEncoder(f"cannot load the static encoder in {self.folder}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if vectors.shape != (tokenizer.get_vocab_size(), self.dim):
            raise InvalidEncoder(
                f"{self.folder / VECTORS} has shape {vectors.shape}, expected {(tokenizer.get_vocab_size(), self.dim)}"
            )
        return tokenizer, np.ascontiguousarray(vectors, dtype=np.float32)


def is_static(folder: Path) -> bool:
    """Whether a folder contains a static encoder."""
    return (folder / META).is_file()


def _sum(vectors: Vectors, ids: list[int]) -> Vectors:
    """(dim,) sum of the rows of these ids."""
    if len(ids) <= _FEW:
        return np.asarray(vectors[ids].sum(axis=0)) if ids else np.zeros(vectors.shape[1], dtype=np.float32)
    distinct, counts = np.unique(ids, return_counts=True)
    return np.asarray(counts.astype(np.float32) @ vectors[distinct])
