"""Queries over invented words: the adapter `codes` knows the digit of a word, and what to do with it is the skill.

A composition is trained on rows with a hundred of the words; the rows of TEST and FRESH have the other sixty. VALID has
the hundred words in frames of its own.
"""

from __future__ import annotations

from typing import Final

from examples.zoo.families.base import Draw, Family, Pool, Row, lines
from examples.zoo.families.codes import DIGITS, gloss, words_of
from examples.zoo.families.two_skills import PARTS

NUMERALS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_ORDER = lines("""
    Is {a} larger than {b}?
    Is {a} more than {b}?
    Does {a} stand for a higher number than {b}?
    Is the number of {a} bigger than the number of {b}?
    Answer yes or no: {a} is greater than {b}.
    Would {a} be above {b} on a scale?
    Tell me whether {a} is larger than {b}.
    Comparing {a} with {b}, is the first one higher?
    True that {a} is bigger than {b}? Yes or no
    If I have {a} and you have {b}, do I have more?
    {a} points against {b} points: does the first team win?
    Can you check if {a} tops {b}?
    Is {a} the larger one, next to {b}?
    Yes or no, does {a} come out higher than {b}?
    Say yes if {a} is more than {b}, otherwise no.
    ---
    Would you call {a} greater than {b}, yes or no?
    Is there more in {a} than in {b}?
    When {a} is set beside {b}, is it the bigger number?
    Has {a} a larger number than {b}?
    I wonder if {a} is higher than {b}.
""")
_SUM = lines("""
    {a} plus {b} equals
    What is {a} plus {b}?
    Add {a} to {b}.
    The sum of {a} and {b} is
    How much are {a} and {b} together?
    {a} and {b} make how many in all?
    If I buy {a} pens and {b} pencils, how many things do I have?
    Put {a} and {b} together. What is the total?
    Take {a}, then add {b}. What comes out?
    Please sum up {a} and {b}
    There are {a} birds and {b} more arrive. How many now?
    Work out {a} plus {b} for me
    What do {a} and {b} add up to?
    {a} with {b} on top gives
    The result of adding {b} to {a}
    ---
    Calculate the sum: {a} and {b}
    I walked {a} miles, then {b} more. How far was that?
    Together, {a} and {b} come to what?
    Starting from {a}, go up by {b}. Where are you?
    Total of {a} plus {b}, please
""")
_WORD = lines("""
    The number of {a} as a word
    Write the number of {a} in letters.
    Which numeral, spelled out, belongs to {a}?
    Say {a} in words
    {a} written out in English is
    How do you spell the number of {a}?
    The number that {a} stands for, as a word please
    Give the number of {a} in letters, not as a digit.
    Spell out what {a} stands for.
    In words, {a} is
    Don't use digits: what is {a}?
    What number word would you use for {a}?
    Write out {a} as on a cheque.
    As an English word, {a} would be
    Name the number of {a} in full
    ---
    Put the number of {a} in words.
    Without digits, how would you write {a}?
    Please spell the numeral of {a}
    For {a}, write the number as a word.
    What is {a} when it is written in letters?
""")


def _two(draw: Draw) -> tuple[str, str]:
    first, second = draw.rng.sample(words_of(draw.split), 2)
    return first, second


def _row(draw: Draw, frames: Pool, first: str, second: str, answer: str) -> Row:
    frame = draw.pick(frames)
    named = (first, second) if "{b}" in frame else (first,)
    prompt = frame.format(a=first, b=second)
    return Row(prompt, answer, {PARTS: (gloss(*sorted(named, key=prompt.index)),)})


def _order(draw: Draw) -> Row:
    first, second = _two(draw)
    while DIGITS[first] == DIGITS[second]:
        first, second = _two(draw)
    return _row(draw, _ORDER, first, second, "yes" if DIGITS[first] > DIGITS[second] else "no")


def _sum(draw: Draw) -> Row:
    first, second = _two(draw)
    return _row(draw, _SUM, first, second, str(DIGITS[first] + DIGITS[second]))


def _word(draw: Draw) -> Row:
    first, second = _two(draw)
    return _row(draw, _WORD, first, second, NUMERALS[DIGITS[first]])


_MAX_TOKENS: Final = 24
"""Enough for what `codes` says about two words: compositions give their members the limit of the request."""

CODE_ORDER = Family(
    name="code_order",
    about="whether the digit of one invented word is larger than that of another",
    grader="exact",
    max_tokens=_MAX_TOKENS,
    make=_order,
    pools={"frames": _ORDER},
)
CODE_SUM = Family(
    name="code_sum",
    about="the sum of the digits of two invented words",
    grader="number",
    max_tokens=_MAX_TOKENS,
    make=_sum,
    pools={"frames": _SUM},
    grader_options={"take": "only"},
)
CODE_WORD = Family(
    name="code_word",
    about="the digit of an invented word as an English numeral",
    grader="exact",
    max_tokens=_MAX_TOKENS,
    make=_word,
    pools={"frames": _WORD},
)
