"""What a prompt looks like, whatever it is about: lengths, marks, shares of characters, words of asking."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ASKING = (
    "what", "which", "who", "when", "where", "why", "how", "how many", "how much", "choose", "answer", "not", "except",
    "true", "false", "write", "function", "calculate", "find", "solve", "prove", "select", "option", "statement",
    "following", "context", "passage", "best",
)  # fmt: skip
"""Words whose presence is a feature each."""
NAMES = (
    "log characters", "log words", "log lines", "characters a word", "digits", "capitals", "punctuation", "not ascii",
    "log numbers", "log options", "code fence or def", "import", "return", "dollars", "log LaTeX commands",
    "log question marks", "log paragraphs", "underscore", "quote", "log equal signs", "log percent signs",
    *ASKING, "ends in a question mark", "ends in a colon", "ends in a full stop",
)  # fmt: skip
"""What each column of `surface` says; shares are of all characters."""

_OPTION = re.compile(r"(?:^|\s)\(?[A-J][\).:]")
_NUMBER = re.compile(r"\d+")
_LATEX = re.compile(r"\\[a-zA-Z]+")
_ASKING = [re.compile(rf"\b{words}\b") for words in ASKING]
_MOST_CHARACTERS = 20_000
"""Longer texts are judged by their beginning, so that a decision takes bounded time."""


def surface(texts: Sequence[str]) -> NDArray[np.float64]:
    """(n, len(NAMES)) features of n texts, none of them standardised."""
    return np.array([_of(text[:_MOST_CHARACTERS]) for text in texts], dtype=np.float64).reshape(-1, len(NAMES))


def _of(text: str) -> list[float]:
    lower, end = text.lower(), text.rstrip()[-1:]
    return [
        *_sizes(text),
        *_shares(text),
        np.log1p(len(_NUMBER.findall(text))),
        np.log1p(len(_OPTION.findall(text))),
        "```" in text or "def " in text,
        "import " in text,
        "return" in text,
        text.count("$") > 1,
        np.log1p(len(_LATEX.findall(text))),
        np.log1p(text.count("?")),
        np.log1p(text.count("\n\n")),
        "_" in text,
        '"' in text,
        np.log1p(text.count("=")),
        np.log1p(text.count("%")),
        *(pattern.search(lower) is not None for pattern in _ASKING),
        end == "?",
        end == ":",
        end == ".",
    ]


def _sizes(text: str) -> list[float]:
    words = len(text.split())
    lines = text.count("\n") + 1
    return [np.log1p(len(text)), np.log1p(words), np.log1p(lines), len(text) / max(words, 1)]


def _shares(text: str) -> list[float]:
    """Of digits, capitals, punctuation, and characters that are not ASCII."""
    length = max(len(text), 1)
    punctuation = len(text) - sum(map(str.isalnum, text)) - sum(map(str.isspace, text))
    foreign = 0 if text.isascii() else sum(not character.isascii() for character in text)
    counts = (sum(map(str.isdigit, text)), sum(map(str.isupper, text)), punctuation, foreign)
    return [count / length for count in counts]
