"""Tokenizers of an engine: those with the same files are read once, since many experts come from one base."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

_KEPT: Final = 8
_SUFFIXES: Final = frozenset({".json", ".jinja", ".model", ".txt", ".vocab"})
_LEFT_OUT: Final = ("generation_config.json", "model.safetensors.index.json")


class Tokenizers:
    """The most recently used tokenizers by the content of their files. Threads may call it at the same time.

    Args:
        most: tokenizers that are kept.
    """

    def __init__(self, most: int = _KEPT) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def of(self, folder: Path) -> Any:
        """The tokenizer in a folder: local files, no code from it. Blocks.

        Raises:
            What `AutoTokenizer.from_pretrained` does.
        """
        key = _content(folder)
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        tokenizer = read_tokenizer(folder)
        if _content(folder) != key:
            return tokenizer  # changed while it was read
        with self._lock:
            self._kept[key] = tokenizer
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder: local files, no code from it. Blocks. Raises what transformers does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _content(folder: Path) -> str:
    """A digest of every file that may belong to a tokenizer; `config.json` names its class."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _SUFFIXES and file.name not in _LEFT_OUT and file.is_file():
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
