"""CachedEncoder: each text is encoded once, for training and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from registry.storage import coe_home
from routers.encoders.base import Encoder, Progress, Vectors, WrappedEncoder
from routers.encoders.store import EmbeddingStore


class CachedEncoder(WrappedEncoder):
    """An encoder whose vectors are kept on disk, one file per encoder digest: a text is encoded once.

    Vectors are stored after every `chunk` texts, so that an interrupted run resumes. Only digests of texts are stored,
    never the texts. Meant for training and evaluation, not for live queries.

    Args:
        folder: of the vectors; `None` takes `$COE_HOME/embeddings`.
        on_progress: called with (texts done, texts in all) while texts are encoded.
    """

    def __init__(
        self, inner: Encoder, folder: Path | None = None, *, on_progress: Progress | None = None, chunk: int = 128
    ) -> None:
        super().__init__(inner)
        self.on_progress = on_progress
        self._chunk = chunk
        self._bypassed = False
        digest = inner.digest.removeprefix("sha256:")
        self._store = EmbeddingStore((folder or coe_home() / "embeddings") / f"{digest}.sqlite")

    @cached_property
    def dim(self) -> int:
        """Length of a vector; read from the store without loading a model."""
        return self._store.dim() or self.inner.dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        if self._bypassed:
            return self.inner.encode(texts)
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        known = self._store.get(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        known |= self._encode_missing(missing)
        return np.stack([known[key] for key in keys]) if keys else np.zeros((0, self.dim), dtype=np.float32)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Encode without the cache inside this context, to measure latency."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    def _encode_missing(self, missing: dict[bytes, str]) -> dict[bytes, Vectors]:
        fresh: dict[bytes, Vectors] = {}
        # Longest first: texts of similar length share a batch, and the remaining time is not underestimated.
        todo = sorted(missing, key=lambda key: -len(missing[key]))
        for start in range(0, len(todo), self._chunk):
            keys = todo[start : start + self._chunk]
            batch = dict(zip(keys, self.inner.encode([missing[key] for key in keys]), strict=True))
            self._store.put(batch)
            fresh |= batch
            if self.on_progress is not None:
                self.on_progress(len(fresh), len(todo))
        return fresh
