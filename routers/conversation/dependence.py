"""Whether a user turn can stand alone: a small classifier of its words, in ten languages.

"and the ones older than 90?" cannot: it needs the turns before it. The classifier is a logistic regression on hashed
character n-grams, first words and the length, trained on the phrasings of `phrasings.yaml` by
`python -m routers.conversation.training`; a turn takes some 60 microseconds.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

WEIGHTS: Final = Path(__file__).with_name("dependence.safetensors")
N_FEATURES: Final = 1 << 13
MOST_CHARACTERS: Final = 240
"""A longer turn brings its own subject: it can stand alone."""
COMPLETE: Final = -6.0
"""Log-odds of such a turn."""
EMPTY: Final = 6.0
"""Log-odds of a turn without letters or digits, such as "?" or an emoji."""
_ORDERS: Final = (2, 3, 4)
_LENGTHS: Final = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 25)
"""Words up to which a turn falls into a class of lengths."""
_DIGITS: Final = re.compile(r"\d+(?:[.,]\d+)*")
_WORD: Final = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_WIDE: Final = re.compile(r"[\u0e00-\u0eff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""Scripts that write without spaces: two characters count as a word."""


def log_odds(text: str) -> float:
    """Log-odds that a user turn cannot stand alone."""
    if len(text) > MOST_CHARACTERS:
        return COMPLETE
    buckets = features(text)
    if not len(buckets):
        return EMPTY
    weights, bias = _model()
    return float(weights[buckets].sum() / len(buckets) ** 0.5 + bias)


@lru_cache(maxsize=1024)
def features(text: str) -> NDArray[np.intp]:
    """The buckets of a turn's character n-grams, first two words and length; a number counts as one digit."""
    text = _DIGITS.sub("0", " ".join(text.casefold().split()))
    words = _WORD.findall(text)
    if not words:
        return np.array([], dtype=np.intp)
    padded = f"^{text}$"
    names = {padded[i : i + n] for n in _ORDERS for i in range(len(padded) - n + 1)}
    names |= {f"word {word}" for word in words}
    names |= {f"first {words[0]}", f"first {' '.join(words[:2])}", f"length {_length(text, len(words))}"}
    return np.array(sorted({zlib.crc32(name.encode("utf-8", "replace")) % N_FEATURES for name in names}), dtype=np.intp)


def _length(text: str, n_words: int) -> int:
    n = n_words + len(_WIDE.findall(text)) // 2
    return next((i for i, most in enumerate(_LENGTHS) if n <= most), len(_LENGTHS))


@lru_cache(maxsize=1)
def _model() -> tuple[NDArray[np.float32], float]:
    """`(N_FEATURES,)` weights, and the intercept."""
    from safetensors.numpy import load_file

    arrays = load_file(WEIGHTS)
    return arrays["weights"].astype(np.float32), float(arrays["bias"][0])
