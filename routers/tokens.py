"""Estimated prompt tokens: a range over tokenizers, from the text alone.

Tokenizers differ by up to a factor of five on the same text (Hindi has 0.24 tokens per character with a vocabulary of
262,000 tokens, 1.04 with 49,000), so an estimate is a range. It may rank experts; it never excludes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Query

TOKENS_PER_MESSAGE: Final = 4
"""Role and separators that a chat template adds around a message: a usual number."""
MOST_PER_MESSAGE: Final = 8
MOST_PER_PROMPT: Final = 32
"""The same, at most: per message, and once per prompt (a default system message)."""

_OTHER, _SPACE, _GAP, _LETTER, _CAPITAL, _DIGIT, _SIGN = range(7)
_FIRST_SCRIPT: Final = 7
# First and last code point, and tokens per character: fewest, usual, most. Fewest and usual were measured on
# SmolLM2 (49,152 tokens) and Gemma 3 (262,144); most is one token per byte of UTF-8.
_SCRIPTS: Final = (
    ((0x0370, 0x052F), (0.18, 0.40, 2)),  # Greek, Cyrillic
    ((0x0530, 0x07FF), (0.20, 0.50, 2)),  # Armenian, Hebrew, Arabic, Syriac
    ((0x0900, 0x0DFF), (0.12, 0.55, 3)),  # scripts of India
    ((0x0E00, 0x0FFF), (0.20, 0.60, 3)),  # Thai, Lao, Tibetan
    ((0x2E80, 0x9FFF), (0.40, 0.95, 3)),  # Chinese, Japanese
    ((0xAC00, 0xD7AF), (0.35, 1.00, 3)),  # Korean
    ((0xF900, 0xFFFF), (0.30, 1.00, 3)),  # forms of these, full width
    ((0x1F000, 0x1FAFF), (0.50, 1.80, 4)),  # emoji
)
_UNKNOWN: Final = (0.25, 2.0, 4)
_CODE_POINTS: Final = 0x20000
"""Code points with a class of their own; those above have the class of the last one."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens of a prompt: at least `low`, `likely`, at most `high`."""

    low: int
    likely: int
    high: int

    def __add__(self, other: TokenRange) -> TokenRange:
        return TokenRange(self.low + other.low, self.likely + other.likely, self.high + other.high)

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The range for a text, without a chat template."""
        if not text:
            return cls(0, 0, 0)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        low, likely, high = _weighed(codes, _classes()[np.minimum(codes, _CODE_POINTS - 1)])
        return cls(math.floor(low), math.ceil(likely), math.ceil(high))

    def framed(self, query: Query) -> TokenRange:
        """With what a chat template adds; nothing for a raw prompt."""
        n = 0 if query.raw else len(query.messages)
        most = MOST_PER_MESSAGE * n + (MOST_PER_PROMPT if n else 0)
        return TokenRange(self.low, self.likely + TOKENS_PER_MESSAGE * n, self.high + most)


def estimate_range(query: Query) -> TokenRange:
    """The range for a whole conversation. `low` leaves the tools out: some templates do not render them."""
    found = TokenRange.of_text("\n".join(message.content for message in query.messages))
    if query.tools:
        tools = TokenRange.of_text("".join(_tools(query)))
        found += TokenRange(0, tools.likely, tools.high)
    return found.framed(query)


def longest_input(query: Query) -> Query:
    """The query with the longest of the texts that it embeds, which is read alone; others as they are."""
    if not query.embeds or len(query.messages) < 2:
        return query
    return replace(query, messages=(max(query.messages, key=lambda message: len(message.content)),))


def most_tokens(query: Query) -> int:
    """An upper bound that costs a microsecond: one token per byte of UTF-8, and what a template adds at most."""
    n = sum(len(content) if content.isascii() else _bytes(content) for content in _contents(query))
    return TokenRange(0, 0, n).framed(query).high


def _contents(query: Query) -> Iterator[str]:
    for message in query.messages:
        yield message.content
    yield from _tools(query)


def _tools(query: Query) -> Iterator[str]:
    return (json.dumps(tool, ensure_ascii=False, default=str) for tool in query.tools)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _weighed(codes: NDArray[np.uint32], classes: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Fewest, usual and most tokens of a text, given its code points and their classes.

    Words start at a letter after something else. The weights of Latin text, code and digits are a fit to 27 kinds of
    text (prose, code, JSON, URLs, hexadecimal, base64, ...), within 32% of the mean of the two tokenizers.
    """
    n = np.bincount(classes, minlength=_FIRST_SCRIPT + len(_SCRIPTS)).astype(float)
    before, after, changed = classes[:-1], classes[1:], codes[1:] != codes[:-1]
    capital, letter = classes == _CAPITAL, (classes == _LETTER) | (classes == _CAPITAL)
    inside = letter[1:] & letter[:-1]
    letters, words = n[_LETTER] + n[_CAPITAL], n[_LETTER] + n[_CAPITAL] - inside.sum()
    capitals_inside, humps = (inside & capital[1:]).sum(), (inside & capital[1:] & ~capital[:-1]).sum()
    signs = ((after == _SIGN) & changed).sum() + (classes[0] == _SIGN)  # a run of one sign is few tokens
    gaps = ((after == _GAP) & changed).sum() + (classes[0] == _GAP)
    numbers = ((before == _SPACE) & (after == _DIGIT)).sum()  # a space joins a word, but no digit
    latin_extra, digits = ((codes >= 0xC0) & letter).sum(), n[_DIGIT]
    repeated = len(codes) - 1 - changed.sum()
    again = (inside & ~changed).sum() if letters > 16 * words else 0  # a run of one letter
    low = 0.8 * words + max(0.0, letters - 16 * words) / 16 + 0.3 * digits + 0.25 * signs + 0.2 * gaps
    likely = (
        1.04 * words + 0.73 * max(0.0, letters - again - 4.5 * words) + 0.2 * (capitals_inside + again) + 0.8 * humps
    )
    likely += 0.47 * latin_extra + digits + numbers + 0.75 * signs + 0.5 * gaps + 0.05 * repeated
    high = words + 0.65 * (letters - words) + 0.5 * capitals_inside + latin_extra + digits + numbers
    high += n[_SIGN] + n[_GAP] + 0.5 * n[_SPACE]
    rest = n[_FIRST_SCRIPT:] @ np.array([weights for _, weights in _SCRIPTS]) + n[_OTHER] * np.array(_UNKNOWN)
    low, high = low + rest[0], high + rest[2]
    return float(low), float(min(max(low, likely + rest[1]), high)), float(high)


@cache
def _classes() -> NDArray[np.uint8]:
    """(_CODE_POINTS,) the class of each code point."""
    found = np.full(_CODE_POINTS, _OTHER, dtype=np.uint8)
    found[:0x80] = _SIGN
    found[:0x20], found[0x20] = _GAP, _SPACE
    found[0x30:0x3A], found[0x41:0x5B], found[0x61:0x7B] = _DIGIT, _CAPITAL, _LETTER
    found[0xC0:0x250] = found[0x1E00:0x1F00] = _LETTER
    for i, ((first, last), _) in enumerate(_SCRIPTS):
        found[first : last + 1] = _FIRST_SCRIPT + i
    return found
