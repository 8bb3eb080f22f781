"""Answer keys: what an answer says in the end, in a form in which two answers are the same or not.

Experts word the same answer in many ways; a vote counts keys. Which key fits is a matter of what is asked:

    choice   the letter of the option that the text names, A to J
    number   the last number of the text, so that `$1,200.00` and `= 1200` agree
    text     the whole text but for case, blanks and closing punctuation
    auto     what is said to be the answer (`\\boxed{...}`, `#### ...`, `the answer is ...`), else the whole text; a
             lone option letter there is a choice, a lone number a number, JSON itself, and anything else a text

An answer that says nothing (an empty one, no option where one is asked for) has no key, and does not vote.
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
"""What an answer says; None where it says nothing."""

_LETTERS: Final = "ABCDEFGHIJ"
_LONE_LETTER: Final = re.compile(rf"\W*([{_LETTERS}]|[{_LETTERS.lower()}](?=\W*$))(?:[).\]:][^\n]*|\W*)")
_LONE_NUMBER: Final = re.compile(r"\W*[-−+]?[$€£¥]?[-−]?\d[\d,.]*\s*%?[\s.]*")
_STATED: Final = (
    re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"(?i:\banswer\b(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be)\b)?\s*[:=]?)\s*\**\s*([^\n]+)"),
)


def key_of(kind: KeyKind) -> AnswerKey:
    """The function of a kind.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in _KEYS:
        raise ConfigError(f"there is no answer key {kind!r}: take one of {', '.join(_KEYS)}")
    return _KEYS[kind]


def choice(text: str) -> str | None:
    """The option that the text names: the last one that is said to be the answer, else the only one named."""
    named = letter_in(text, _LETTERS)
    return None if named == "?" else named


def number(text: str) -> str | None:
    """The last number of the text, without trailing zeros."""
    found = numbers_in(text)
    return f"{found[-1].normalize():f}" if found else None


def plain(text: str) -> str | None:
    """The text but for case, blanks, Unicode forms, and punctuation or markup around it."""
    words = " ".join(unicodedata.normalize("NFKC", text).split())
    return words.strip(" .!?,;:*_`\"'").casefold() or None


def auto(text: str) -> str | None:
    """See the module: what is said to be the answer, in the form that it has."""
    said = next((matches[-1] for stated in _STATED if (matches := stated.findall(text))), text).strip()
    if match := _LONE_LETTER.fullmatch(said):
        return match[1].upper()
    if _LONE_NUMBER.fullmatch(said):
        return number(said)
    return _json(said) or plain(said)


def _json(text: str) -> str | None:
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


_KEYS: Final[Mapping[str, AnswerKey]] = {"auto": auto, "choice": choice, "number": number, "text": plain}
