"""Grader of multiple choice: reads the option's letter out of free text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from coe.evaluation.graders.base import GoldError, GraderModel

_COMMAND = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*_`$]")


class Choice(GraderModel):
    """1 when the answer names the right option: `B`, `(b)`, `**B**`, `The answer is (B).`, `B) Paris`, `\\boxed{B}`.

    What is said to be *the answer* counts most, and of several such statements the last; then a leading letter, then a
    last line that is a letter, then the only letter that is named at all. An answer that hedges ("A or B") scores 0.
    A row's `choices`, a list of texts, bounds the letters, and an answer equal to one of them names its letter.
    """

    letters: Annotated[str, Field(pattern="^[A-Z]+$")] = "ABCDEFGHIJ"

    def grade(self, answer: str, row: Mapping[str, Any]) -> float:
        """See `Grader.grade`."""
        choices = row.get("choices") or ()
        letters = self.letters[: len(choices)] if choices else self.letters
        gold = row["answer"]
        if not (isinstance(gold, str) and len(gold) == 1 and gold in letters):
            raise GoldError(f"`answer` must be one letter of {letters}, not {gold!r}")
        return float(letter_in(answer, letters, choices) == gold)


def letter_in(answer: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that the answer names, or None where it names none or several."""
    while (unwrapped := _COMMAND.sub(r"\1", answer)) != answer:
        answer = unwrapped
    text = _MARKUP.sub("", answer).strip()
    upper, lower = f"[{letters}]", f"[{letters.lower()}]"
    for choice, letter in zip(choices, letters, strict=False):
        if text.casefold().rstrip(".") == str(choice).strip().casefold().rstrip("."):
            return letter
    if match := re.fullmatch(rf"\W*({upper}|{lower})\W*", text):
        return match[1].upper()
    return _stated(text, upper, lower) or _only_one(text, upper, lower)


def _stated(text: str, upper: str, lower: str) -> str | None:
    """The letter that is said to be the answer, leads the text, or is its last line. Hedged: none at all."""
    # A bare small letter is a word more often than an option: it counts in brackets or at the very end.
    letter = rf"(?:[(\[]\s*({upper}|{lower})\s*[)\]]|({upper})(?!\w|'\w)|({lower})(?=\W*$))"
    said = (
        r"(?i:(?:answer|(?:correct|right|best)\s+(?:option|choice))(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be))?"
        r"(?:\s+(?:option|choice|letter))?)\s*[:=-]*\s*"
    )
    leading = rf"^[(\[]?({upper})(?:\s*[)\].:]|\s*$|\s+[-–—]\s)"
    for pattern in (said + letter, leading, rf"^\W*({upper})\W*\Z"):
        matches = list(re.finditer(pattern, text, re.MULTILINE if pattern is not leading else 0))
        if matches:
            tail = text[matches[-1].end() :]
            hedged = re.match(rf"\s*(?:or\b|and\b|/|,|&)\s*(?:option\s+)?[(\[]?{upper}(?!\w)", tail)
            return "?" if hedged else next(group for group in matches[-1].groups() if group).upper()
    return None


def _only_one(text: str, upper: str, lower: str) -> str | None:
    """The only option named anywhere: in brackets or after "option", else as a capital alone (not the word A or I)."""
    marked = rf"[(\[]\s*({upper}|{lower})\s*[)\]]|\b(?i:option|choice)\s+({upper})\b"
    alone = rf"(?<![\w'])(?!(?:A|I)\s+(?!or\b|and\b)\w)({upper})(?![\w'])()"
    for pattern in (marked, alone):
        named = {(first or second).upper() for first, second in re.findall(pattern, text)}
        if named:
            return named.pop() if len(named) == 1 else None
    return None
