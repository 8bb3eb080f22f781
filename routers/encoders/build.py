"""Encoders by name: text -> (n, dim) unit vectors.

minilm           all-MiniLM-L6-v2, from an installed package: nothing is downloaded
a folder         a static encoder (fast: tokens' vectors, averaged), or any sentence-transformers model
hashing:<dim>    words and character n-grams: no weights
"""

from __future__ import annotations

from pathlib import Path

from routers.encoders.base import Encoder, Progress, Vectors
from routers.encoders.cache import CachedEncoder
from routers.encoders.hashing import HashingEncoder
from routers.encoders.static import StaticEncoder, is_static
from routers.encoders.transformer import DEFAULT_ENCODER, DEFAULT_MAX_TOKENS, SentenceTransformerEncoder
from routers.errors import InvalidEncoder

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_MAX_TOKENS",
    "CachedEncoder",
    "Encoder",
    "HashingEncoder",
    "Progress",
    "SentenceTransformerEncoder",
    "StaticEncoder",
    "Vectors",
    "build_encoder",
]


def build_encoder(name: str = DEFAULT_ENCODER) -> Encoder:
    """The encoder of a name: `minilm`, `hashing`, `hashing:<dim>`, or a folder.

    A folder is that of a static encoder (`coe encoder distill` writes one) or of a sentence-transformers model.

    Raises:
        InvalidEncoder: there is no encoder of this name.
    """
    kind, _, argument = name.partition(":")
    if name == DEFAULT_ENCODER:
        return SentenceTransformerEncoder()
    if kind == "hashing" and (argument.isdecimal() or name == "hashing"):
        return HashingEncoder(int(argument)) if argument else HashingEncoder()
    if name and is_static(Path(name)):
        return StaticEncoder(name)
    if name and Path(name).is_dir():
        return SentenceTransformerEncoder(name)
    raise InvalidEncoder(f"no encoder {name!r}: use 'minilm', 'hashing', 'hashing:<dim>' or the folder of a model")
