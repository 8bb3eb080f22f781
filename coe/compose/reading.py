"""Reading free text: the option that it names, the numbers that it contains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

_COMMAND = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*_`$]")

# A minus is a sign only if nothing precedes it directly: `10-5` and `2023-11-16` contain no negative number.
_NUMBER = re.compile(
    r"""(?P<sign>(?<![\w.)\]}%])[-−+])?
        (?:[$€£¥](?P<inner_sign>[-−])?)?
        (?P<digits>(?<!\w)(?<!\d[.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:[.]\d+)?
                  |(?<![\w.])[.]\d+)
        (?P<exponent>[eE][-+]?\d{1,3}(?!\d))?""",
    re.VERBOSE,
)


def letter_in(answer: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that the answer names; None if it names none or several."""
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
    """The letter stated as the answer, at the start of the text, or alone in a line; "?" if it is hedged."""
    # A bare lower-case letter is more often a word than an option: it counts in brackets or at the very end.
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


def numbers_in(text: str) -> list[Decimal]:
    """Every number of a text, in order."""
    return [_value(match) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    negative = (match["sign"] or "+") != "+" or bool(match["inner_sign"])
    return -value if negative else value
