"""One form for equal characters (widths, digits of all scripts, invisible marks), and words without blanks."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_SUPERSCRIPTS: Final = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED: Final = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_VULGAR: Final = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_INVISIBLE: Final = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
"""Soft hyphens, zero-width characters, marks of writing direction."""
_WIDE_COMMA: Final = re.compile("，(?![０-９])|(?<![０-９])，")
"""A comma that separates clauses, not the thousands of a full-width number."""
_SARA_AM: Final = "\u0e4d\u0e32"
"""The Thai vowel ำ in the two parts that NFKC makes of it."""
_DIGITS: Final = re.compile(r"[^\W\D0-9]")
_SIGNS: Final = str.maketrans(
    {"٫": ".", "٬": ",", "،": ", ", "؛": "; ", "۔": "。", "।": "。", "॥": "。", "⁄": "/", "∕": "/", "−": "-", "‐": "-"}
    | {"‑": "-", "﹣": "-", "’": "'", "‘": "'", "\u202f": " ", "\u00a0": " ", "\u2009": " "}
)
UNSPACED: Final = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
)
"""Scripts that write words without blanks between them, as a character class: Thai, Lao, Burmese, Khmer, kana, Han."""
_OTHER: Final = rf"{UNSPACED}\u0600-\u06ff\u0900-\u0dff\uac00-\ud7af"
_SEAM: Final = re.compile(rf"(?<=[{_OTHER}])(?=[0-9A-Za-z])|(?<=[0-9A-Za-z])(?=[{_OTHER}])")
_KATAKANA: Final = "\u30a1-\u30fa\u30fc"
_MARKS: Final = "\u0300-\u036f\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0903\u093a-\u094f\u0955-\u0957\u0962\u0963"
_ARABIC_MARKS: Final = re.compile("[\u0640\u064b-\u0652\u0670]")
MAX_CHARS: Final = 1_000_000
"""Characters of an answer that are read, the last ones; reading takes a few microseconds each at most."""
ENDS: Final = ".!?,;:。、…؟"
"""Punctuation at the end of a text."""


def fold(text: str) -> str:
    """The text with one form for equal characters; raised digits as `^2`.

    Full-width letters, digits and punctuation become ASCII, digits of all scripts 0 to 9, the separators of Arabic
    numbers a point and a comma; marks of writing direction disappear. A danda is a full stop `。`.
    Some characters become many: the last `MAX_CHARS` are kept.
    """
    if text.isascii():
        return text
    text = _WIDE_COMMA.sub(", ", _INVISIBLE.sub("", text))
    text = _RAISED.sub(lambda raised: "^" + raised[0].translate(_SUPERSCRIPTS), _VULGAR.sub(" ", text))
    text = unicodedata.normalize("NFKC", text).replace(_SARA_AM, "ำ").translate(_SIGNS)
    return _DIGITS.sub(lambda digit: str(unicodedata.digit(digit[0])), text[-MAX_CHARS:])


def spaced(text: str) -> str:
    """A folded text with a blank between Latin letters or digits and letters of other scripts: `答案是 42`."""
    return text if text.isascii() else _SEAM.sub(" ", text)


def without_arabic_marks(text: str) -> str:
    """The text without Arabic vowel signs and lengthened strokes, which are optional in writing."""
    return _ARABIC_MARKS.sub("", text)


_WORD: Final = re.compile(rf"[\w{_MARKS}]")
_IS_UNSPACED: Final = re.compile(f"[{UNSPACED}]")
_IS_KATAKANA: Final = re.compile(f"[{_KATAKANA}]")


def contains_words(text: str, words: str) -> bool:
    """Whether folded `words` occur in a folded text as whole words.

    In scripts without blanks between words they may stand anywhere; of katakana, a whole run must match.
    """
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not (_continues(words[0], text[max(0, start - 1) : start]) or _continues(words[-1], text[end : end + 1])):
            return True
        start = text.find(words, start + 1)
    return False


def _continues(edge: str, neighbour: str) -> bool:
    """Whether the neighbour of a word's first or last character makes the word longer."""
    if not _WORD.match(neighbour):
        return False
    if _IS_KATAKANA.match(edge):
        return _IS_KATAKANA.match(neighbour) is not None
    return not (_IS_UNSPACED.match(edge) or _IS_UNSPACED.match(neighbour))
