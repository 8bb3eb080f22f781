"""Answer keys: the normalised final answer of a text, for comparing answers.

Experts word the same answer in many ways; a vote counts keys. The kinds:

    choice   the letter of the option that the text names, A to J
    number   the last number of the text, so that `$1,200.00` and `= 1200` agree
    text     the whole text without case, blanks and closing punctuation
    auto     the stated answer (`\\boxed{...}`, `#### ...`, `the answer is ...`), else the whole text; a lone option
             letter is a choice, a lone number a number, JSON is compared as JSON, and anything else as text

An empty answer, or one without an option under `choice`, has no key and does not vote.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Final, Literal

from coe.compose.reading import letter_in, numbers_in
from coe.errors import ConfigError

KeyKind = Literal["auto", "choice", "number", "text"]
AnswerKey = Callable[[str], str | None]
"""Text of an answer -> its key; None if it has none."""

_LETTERS: Final = "ABCDEFGHIJ"
_LONE_LETTER: Final = re.compile(rf"\W*([{_LETTERS}]|[{_LETTERS.lower()}](?=\W*$))(?:[).\]:][^\n]*|\W*)")
_LONE_NUMBER: Final = re.compile(r"\W*[-−+]?[$€£¥]?[-−]?\d[\d,.]*\s*%?[\s.]*")
_STATED: Final = (
    re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"(?i:\banswer\b(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be)\b)?\s*[:=]?)\s*\**\s*([^\n]+)"),
)


def key_of(kind: KeyKind) -> AnswerKey:
    """The key function of a kind.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in _KEYS:
        raise ConfigError(f"there is no answer key {kind!r}; there are: {', '.join(_KEYS)}")
    return _KEYS[kind]


def choice(text: str) -> str | None:
    """The option that the text names: the last one stated as the answer, else the only one named."""
    named = letter_in(text, _LETTERS)
    return None if named == "?" else named


def number(text: str) -> str | None:
    """The last number of the text, without trailing zeros."""
    found = numbers_in(text)
    return f"{found[-1].normalize():f}" if found else None


def plain(text: str) -> str | None:
    """The text without case, blanks, Unicode forms, and punctuation or markup around it."""
    words = " ".join(unicodedata.normalize("NFKC", text).split())
    return words.strip(" .!?,;:*_`\"'").casefold() or None


def auto(text: str) -> str | None:
    """The stated answer, else the whole text, by its own form; see the module."""
    stated_answer = next((matches[-1] for stated in _STATED if (matches := stated.findall(text))), text).strip()
    if match := _LONE_LETTER.fullmatch(stated_answer):
        return match[1].upper()
    if _LONE_NUMBER.fullmatch(stated_answer):
        return number(stated_answer)
    return _json(stated_answer) or plain(stated_answer)


def _json(text: str) -> str | None:
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


_KEYS: Final[Mapping[str, AnswerKey]] = {"auto": auto, "choice": choice, "number": number, "text": plain}
