"""The numbers of a text: `$1,234.50`, `1.234,56 €`, `٤٢`, `\\frac{1}{2}`, `3 \\times 10^{5}`."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from decimal import Context, Decimal, DecimalException
from typing import Final, Literal

from coe.answers.text import fold, spaced

DecimalMark = Literal["auto", "point", "comma"]
MAX_DIGITS: Final = 400
"""A longer number is not read: it equals no other."""
NOT_READ: Final = Decimal("NaN")
"""Stands for an expression with an unknown value, as `\\sqrt{2}`, `2\\pi` or a number of too many digits."""
_MOST_EXPONENT: Final = 999
_CONTEXT: Final = Context(prec=50)

_POINT: Final = (
    r"\d{1,3}(?:,\d{3})++(?!\d)(?:\.\d++)?|\d{1,2}(?:,\d{2}(?!\d))++,\d{3}(?![,\d])(?:\.\d++)?|\d++(?:\.\d++)?"
)
_COMMA: Final = r"\d{1,3}(?:(?:\.\d{3})++|(?:[ ]\d{3})++)(?!\d)(?:,\d++)?|\d++(?:[.,]\d++)?"
_LATEX_GROUP: Final = re.compile(r"(?<=\d)(?:\{[,.]\}|\\[,!;:]|\\ )(?=\d{3})")
"""`9{,}500` and `9\\,500` are how LaTeX groups digits."""
_WRAPPED: Final = re.compile(r"(?<=[\^_])\s?\{\s?([-+]?[\w.]{1,20})\s?\}")
_FRACTION: Final = re.compile(
    r"\\[dt]?frac\s?(?:\{\s?([-+]?[\d.,]{1,40})\s?\}|(\d))\s?(?:\{\s?([\d.,]{1,40})\s?\}|(\d)(?!\d))"
)
"""Without braces, as in `\\frac12` and `\\frac1{10}`, LaTeX takes one digit. `\\frac123` is left alone."""
_LATEX: Final = re.compile(r"\\(times|cdot|pi)(?![a-zA-Z])\s?")
_DATE: Final = re.compile(r"(?<=\d)/(?=\d{1,4}/\d)|(?<=/\d)/(?=\d)|(?<=/\d\d)/(?=\d)|(?<=/\d{4})/(?=\d)")
_SIGNS: Final = {"times": "×", "cdot": "×", "pi": "π"}


def _number(digits: str, after_point: str) -> re.Pattern[str]:
    # A minus is a sign only if nothing precedes it directly: `10-5` and `2023-11-16` contain no negative number.
    return re.compile(
        rf"""(?=[-−+$€£¥₹√\\.,\d])(?P<root>(?:√|\\sqrt)[ ]?[\[{{(]?[ ]?(?=\d))?
        (?P<sign>(?<![\w.)\]}}%])[-−+])?
        (?:[$€£¥₹](?P<inner_sign>[-−])?)?
        (?P<digits>(?<!\w)(?<!\d[.])(?<![\^_])(?:{digits})|(?<![\w.])[{after_point}]\d++)
        (?P<exponent>[eE][-+]?\d{{1,3}}(?!\d))?
        (?:[ ]?[×x*][ ]?10[ ]?(?:\^|\*\*)[ ]?(?P<ten>[-+]?\d{{1,4}}(?![\d.]))
          |(?:\^|\*\*(?=[-+]?\d))(?P<power>[-+]?\w[\w.]{{0,20}})(?P<tower>\^)?
          |[ ]?/[ ]?(?P<denominator>\d{{1,40}}(?:[.,]\d{{1,40}})?)(?![\w/]))?
        (?P<symbol>[ ]?[π√])?""",
        re.VERBOSE,
    )


_PATTERNS: Final = {"point": _number(_POINT, "."), "comma": _number(_COMMA, ",.")}
_BOTH_MARKS: Final = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,]*\d)")
_ALONE: Final = re.compile(
    r"[*$€£¥₹≈=~]{0,4}\s?[-+]?(?:\d{1,3}(?:[. ]\d{3}){1,6},\d{1,3}|\d{1,15},\d{1,2})\s?[^\d\s,()\[\]]{0,12}"
)
_WORD: Final = re.compile(r"[^\W\d_]+")
_COMMA_LANGUAGES: Final = frozenset(
    re.findall(
        r"\S+",
        """der die das ist sind und nicht ein eine mit von für beträgt lautet ergibt antwort also insgesamt kostet euro
        la le les est sont et une du des pas pour avec donc réponse résultat vaut environ soit coûte
        el los las es son un una del por con respuesta resultado cuesta total entonces
        il lo gli è sono di per con risposta risultato quindi circa costa""",
    )
)
_POINT_LANGUAGES: Final = frozenset(
    re.findall(r"\S+", "the is are and of to in it so that answer for with we have total cost each per result")
)
_SAMPLED: Final = 4_000
"""Characters at the end of a text whose words decide its language."""


def numbers_in(text: str, decimal: DecimalMark = "auto") -> list[Decimal]:
    """Every number of a text, in order; `NOT_READ` for expressions without a value that this reads.

    A fraction, a power of a number and a number times a power of ten are one number each; the exponent of a unit or
    variable (`25 m^2`) is none.

    decimal: the decimal mark. `auto` is a comma in German, French, Spanish and Italian text, beside thousands with
        points (`1.234,56`), and in a text that is one number with one or two decimals (`3,14`); else a point.
    """
    return [_value(match, mark) for match, mark in _matches(text, decimal)]


def last_number(text: str, decimal: DecimalMark = "auto") -> Decimal | None:
    """The last of `numbers_in`; None if there is none."""
    found = deque(_matches(text, decimal), maxlen=1)
    return _value(*found[0]) if found else None


def decimal_mark(text: str) -> Literal["point", "comma"]:
    """The decimal mark that a folded text uses."""
    if _BOTH_MARKS.search(text) or (len(text) < 80 and _ALONE.fullmatch(text.strip())):
        return "comma"
    if "," not in text and not re.search(r"\d\.\d{3}(?!\d)", text):
        return "point"
    words = [word.casefold() for word in _WORD.findall(text[-_SAMPLED:])]
    commas = sum(word in _COMMA_LANGUAGES for word in words)
    return "comma" if commas > sum(word in _POINT_LANGUAGES for word in words) else "point"


def _matches(text: str, decimal: DecimalMark) -> Iterator[tuple[re.Match[str], str]]:
    text = _plain_latex(spaced(fold(text)))
    if "/" in text:
        text = _DATE.sub("-", text)
    mark = decimal_mark(text) if decimal == "auto" else decimal
    return ((match, mark) for match in _PATTERNS[mark].finditer(text))


def _plain_latex(text: str) -> str:
    if "\\" not in text and "{" not in text:
        return text
    text = _LATEX.sub(lambda sign: _SIGNS[sign[1]], _LATEX_GROUP.sub("", text))
    return _FRACTION.sub(r" \1\2/\3\4", _WRAPPED.sub(r"\1", text))


def _value(match: re.Match[str], mark: str) -> Decimal:
    digits = match["digits"]
    if match["root"] or match["symbol"] or match["tower"] or len(digits) > MAX_DIGITS:
        return NOT_READ
    try:
        value = _decimal(digits, mark, match["exponent"] or "")
        if match["ten"]:
            value = _CONTEXT.scaleb(value, int(match["ten"])) if abs(int(match["ten"])) <= _MOST_EXPONENT else NOT_READ
        elif match["power"]:
            value = _power(value, match["power"])
        elif match["denominator"]:
            value = _CONTEXT.divide(value, _decimal(match["denominator"], mark))
    except (DecimalException, ValueError):
        return NOT_READ
    negative = (match["sign"] or "+") != "+" or bool(match["inner_sign"])
    return -value if negative else value


def _decimal(digits: str, mark: str, exponent: str = "") -> Decimal:
    if mark == "comma":
        whole, comma, part = digits.replace(" ", "").partition(",")
        groups = re.fullmatch(r"\d{1,3}(?:\.\d{3})+", whole)
        grouped = groups is not None and not whole.startswith("0")
        return Decimal(
            (whole.replace(".", "") if grouped or comma else whole) + (f".{part}" if comma else "") + exponent
        )
    return Decimal(digits.replace(",", "") + exponent)


def _power(base: Decimal, exponent: str) -> Decimal:
    """A power, if it is a whole number below 10^50 or has at most 50 digits."""
    if not re.fullmatch(r"[-+]?\d{1,3}", exponent):
        return NOT_READ
    value = _CONTEXT.power(base, int(exponent))
    return value if value.is_finite() and abs(value.adjusted()) < _CONTEXT.prec else NOT_READ
