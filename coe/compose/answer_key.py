"""Answer keys: the normalised final answer of a text, for comparing answers.

Experts word the same answer in many ways; a vote counts keys. The kinds:

    choice   the letter of the option that the text names, A to J
    number   the last number of the text, so that `$1,200.00` and `= 1200` agree
    text     the whole text without case, blanks and closing punctuation
    auto     the stated answer (`\\boxed{...}`, `#### ...`, `the answer is ...`), else the whole text; a lone option
             letter is a choice, a lone number a number, JSON is compared as JSON, and anything else as text

Thinking text is not read. An answer without an option under `choice`, or a number under `number`, has no key and does
not vote; nor has an empty answer, a refusal, or "I don't know" (`coe.answers.refusals`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal

from coe.answers.numbers import last_number, numbers_in
from coe.answers.options import letter_in, named_option
from coe.answers.refusals import refuses
from coe.answers.stated import stated_answer, without_copula
from coe.answers.text import fold, without_arabic_marks
from coe.answers.thinking import without_thoughts
from coe.errors import ConfigError

KeyKind = Literal["auto", "choice", "number", "text"]
AnswerKey = Callable[[str], str | None]
"""Text of an answer -> its key; None if it has none."""

_LETTERS: Final = "ABCDEFGHIJ"
MAX_KEY_CHARS: Final = 100_000
"""Characters of an answer that a key is read from, the last ones. A gateway reads keys between other requests."""
_LONGEST_NUMBER: Final = 100
"""Characters of a text that may be a lone number."""


def key_of(kind: KeyKind, *, keep_thinking: bool = False) -> AnswerKey:
    """The key function of a kind.

    keep_thinking: thinking text is read as a part of the answer.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in _KEYS:
        raise ConfigError(f"there is no answer key {kind!r}; there are: {', '.join(_KEYS)}")
    return partial(_key, _KEYS[kind], keep_thinking)


def _key(reads: AnswerKey, keep_thinking: bool, text: str) -> str | None:
    answer = (text if keep_thinking else without_thoughts(text))[-MAX_KEY_CHARS:]
    return None if refuses(answer) else reads(answer)


def choice(text: str) -> str | None:
    """The option that the text names: the last one stated as the answer, else the only one named."""
    return letter_in(text, _LETTERS)


def number(text: str) -> str | None:
    """The last number of the text, without trailing zeros."""
    last = last_number(text)
    return f"{last.normalize():f}" if last is not None and last.is_finite() else None


def plain(text: str) -> str | None:
    """The text without case, blanks, Unicode forms, and punctuation or markup around it."""
    words = " ".join(without_arabic_marks(fold(text)).split())
    return words.strip(" .!?,;:*_`\"'。、…؟¿¡").casefold() or None


def auto(text: str) -> str | None:
    """The stated answer, else the whole text, by its own form; see the module."""
    stated = stated_answer(text)
    answer = without_copula(text).strip() if stated is None else stated
    return (
        _json(answer) or _lone_letter(answer) or _lone_number(answer) or named_option(text, _LETTERS) or plain(answer)
    )


def _lone_letter(text: str) -> str | None:
    """The letter of a text like `B`, `(b)` or `B) Paris`."""
    first = fold(text).lstrip(" \t([{*_`\"'$")[:1]
    named = named_option(text, _LETTERS) if first.upper() in _LETTERS else None
    alone = fold(text).strip(" \t\n()[]{}*_`\"'.$:!。") if named is None and len(text) < _LONGEST_NUMBER else ""
    if len(alone) == 1 and alone.upper() in _LETTERS:
        return alone.upper()
    return named if named is not None and named == first.upper() else None


def _lone_number(text: str) -> str | None:
    """The number of a short text without words."""
    if len(text) > _LONGEST_NUMBER or any(c.isalpha() or c in "/^√" for c in fold(text)):
        return None
    return number(text) if len(numbers_in(text)) == 1 else None


def _json(text: str) -> str | None:
    text = text.strip()
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return None


_KEYS: Final[Mapping[str, AnswerKey]] = {"auto": auto, "choice": choice, "number": number, "text": plain}
