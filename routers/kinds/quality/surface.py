"""Surface features of a prompt: lengths, marks, shares of characters, question words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from math import log1p

import numpy as np
from numpy.typing import NDArray

ASKING = (
    "what", "which", "who", "when", "where", "why", "how", "how many", "how much", "choose", "answer", "not", "except",
    "true", "false", "write", "function", "calculate", "find", "solve", "prove", "select", "option", "statement",
    "following", "context", "passage", "best",
)  # fmt: skip
"""Words; the presence of each is a feature."""
NAMES = (
    "log characters", "log words", "log lines", "characters a word", "digits", "capitals", "punctuation", "not ascii",
    "log numbers", "log options", "code fence or def", "import", "return", "dollars", "log LaTeX commands",
    "log question marks", "log paragraphs", "underscore", "quote", "log equal signs", "log percent signs",
    *ASKING, "ends in a question mark", "ends in a colon", "ends in a full stop",
)  # fmt: skip
"""Columns of `surface`; shares are of all characters."""

_OPTION = re.compile(r"(?:^|\s)\(?[A-J][\).:]")
_NUMBER = re.compile(r"\d+")
_LATEX = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"\w+")
_MOST_CHARACTERS = 20_000
"""Longer texts are cut here, so that a decision takes bounded time."""


def surface(texts: Sequence[str]) -> NDArray[np.float64]:
    """(n, len(NAMES)) features of n texts, none of them standardised."""
    return np.array([_of(text[:_MOST_CHARACTERS]) for text in texts], dtype=np.float64).reshape(-1, len(NAMES))


def _of(text: str) -> list[float]:
    words = _WORD.findall(text.lower())
    found = {*words, *map(" ".join, pairwise(words))}
    end = text.rstrip()[-1:]
    return [
        *_sizes(text),
        *_shares(text),
        log1p(len(_NUMBER.findall(text))),
        log1p(len(_OPTION.findall(text))),
        "```" in text or "def " in text,
        "import " in text,
        "return" in text,
        text.count("$") > 1,
        log1p(len(_LATEX.findall(text))),
        log1p(text.count("?")),
        log1p(text.count("\n\n")),
        "_" in text,
        '"' in text,
        log1p(text.count("=")),
        log1p(text.count("%")),
        *(word in found for word in ASKING),
        end == "?",
        end == ":",
        end == ".",
    ]


def _sizes(text: str) -> list[float]:
    words = len(text.split())
    lines = text.count("\n") + 1
    return [log1p(len(text)), log1p(words), log1p(lines), len(text) / max(words, 1)]


def _shares(text: str) -> list[float]:
    """Of ASCII digits, capitals and punctuation, and of characters that are not ASCII."""
    found = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    counts = np.add.reduceat(np.bincount(found, minlength=256), _RANGES)
    digits, capitals = counts[_DIGITS], counts[_CAPITALS]
    length = max(len(text), 1)
    return [count / length for count in (digits, capitals, counts[_MARKS].sum(), counts[_LEADING])]


# Bytes of UTF-8, cut into ranges: control and space, marks, 0-9, marks, A-Z, marks, a-z, marks, DEL and continuation
# bytes, and the first bytes of characters that are not ASCII.
_RANGES = [0, 33, 48, 58, 65, 91, 97, 123, 127, 192]
_DIGITS, _CAPITALS, _LEADING = 2, 4, 9
_MARKS = [1, 3, 5, 7]
