"""Numbers in text: scripts, languages, fractions and powers, and what is no number."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest

from coe.answers.numbers import NOT_READ, last_number, numbers_in


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("9{,}500", ["9500"]),
        ("9\\,500", ["9500"]),
        ("1/2", ["0.5"]),
        ("2^{10}", ["1024"]),
        ("2^10", ["1024"]),
        ("25 m^2", ["25"]),
        ("25 m²", ["25"]),
        ("10²", ["100"]),
        ("\\frac{1}{2}", ["0.5"]),
        ("\\dfrac12", ["0.5"]),
        ("\\frac1{10}", ["0.1"]),
        ("\\frac{3}4", ["0.75"]),
        ("3 \\times 10^{5}", ["3e5"]),
        ("3×10⁵", ["3e5"]),
        ("\\sqrt{2}", ["NaN"]),
        ("2\\pi", ["NaN"]),
        ("答案是42。", ["42"]),
        ("答案是４２。", ["42"]),
        ("٤٢", ["42"]),
        ("४२", ["42"]),
        ("๔๒", ["42"]),
        ("1.234,56 €", ["1234.56"]),
        ("3,14", ["3.14"]),
        ("Die Antwort ist 3,5.", ["3.5"]),
        ("Die Antwort ist 1.234.", ["1234"]),
        ("La réponse est 1 234,5", ["1234.5"]),
        ("12,34,567", ["1234567"]),
        ("The values are 3,5", ["3", "5"]),
        ("x_1 = 4", ["4"]),
        ("x_{1}=4", ["4"]),
        ("٣٫١٤", ["3.14"]),
        ("١٬٢٣٤", ["1234"]),
        ("La respuesta es 0.125", ["0.125"]),
        ("Das Ergebnis ist 1.234.567", ["1234567"]),
        ("\u200f42\u200e", ["42"]),
        ("3/4/2024", ["3", "4", "2024"]),
        ("24/7x", ["24", "7"]),
        ("5 km/h", ["5"]),
        ("1 1/2", ["1", "0.5"]),
        ("1,5 und 2,5 sind es", ["1.5", "2.5"]),
        ("二〇", []),
        ("$\\frac{3}{4}$", ["0.75"]),
        ("-1/2", ["-0.5"]),
        ("2**3=8", ["8", "8"]),
        ("n = 10^{3}", ["1000"]),
        ("e^2 = 7.389", ["7.389"]),
        ("\\boxed{50\\%}", ["50"]),
        ("4 * 5 = 20", ["4", "5", "20"]),
        ("2 x 10 = 20", ["2", "10", "20"]),
        ("1,234", ["1234"]),
        ("₹1,23,456", ["123456"]),
    ],
)
def test_numbers(text: str, found: list[str]) -> None:
    assert [str(number) for number in numbers_in(text)] == [str(Decimal(number)) for number in found] or numbers_in(
        text
    ) == [Decimal(number) for number in found]


def test_a_set_decimal_mark_decides() -> None:
    assert numbers_in("1,234", "comma") == [Decimal("1.234")]
    assert numbers_in("1.234", "comma") == [1234]
    assert numbers_in("Die Antwort ist 1.234", "point") == [Decimal("1.234")]


def test_long_numbers_and_high_powers_are_not_read() -> None:
    for text in ("9" * 401, "2^{999}", "10^10^10", "9 × 10^9999", "1/0"):
        assert str(last_number(text)) == str(NOT_READ), text
    assert last_number("9" * 400) == Decimal("9" * 400)
    assert last_number("none") is None


@pytest.mark.parametrize("part", ["1,", "1/", "2^{", "9{,}", "1 ", "-", "1 × 10^", "\\frac{1}{", "½", "ﷺ", "$"])
def test_time_is_linear_in_the_text(part: str) -> None:
    text = part * (500_000 // len(part))
    started = time.monotonic()
    last_number(text)
    assert time.monotonic() - started < 15
