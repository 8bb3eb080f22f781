"""Text, number, choice and JSON graders: which answers are correct and which are not."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from coe.answers.numbers import numbers_in
from coe.answers.text import MAX_CHARS
from coe.errors import TaskError
from coe.evaluation.graders import GRADERS, GoldError, GraderModel, score_of
from coe.evaluation.graders.json_equality import JsonEquality
from coe.evaluation.graders.multiple_choice import MultipleChoice
from coe.evaluation.graders.number import Number
from coe.evaluation.graders.text import Contains, Exact


def row(answer: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "r", "prompt": "?", "answer": answer, **fields}


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("Paris", "Paris", 1),
        ("  paris.\n", "Paris", 1),
        ("New   York!", "new york", 1),
        ("cafe\u0301", "café", 1),
        ("It is Paris", "Paris", 0),
        ("", "Paris", 0),
        ("D.C.", ["Washington", "d.c"], 1),
        ("Rome", ["Washington", "D.C."], 0),
    ],
)
def test_exact(answer: str, gold: Any, score: float) -> None:
    assert Exact().grade(answer, row(gold)) == score


def test_exact_can_compare_every_character() -> None:
    strict = Exact(ignore_case=False, ignore_whitespace=False, strip="")
    assert strict.grade("Paris", row("Paris")) == 1
    assert [strict.grade(text, row("Paris")) for text in ("paris", " Paris", "Paris.")] == [0, 0, 0]
    assert Exact(ignore_whitespace=False).grade("Paris.", row("Paris")) == 1


@pytest.mark.parametrize(
    ("answer", "score"), [("It is PARIS, I think.", 1), ("Parisian food", 0), ("comparis", 0), ("(Paris)", 1), ("", 0)]
)
def test_contains_whole_words(answer: str, score: float) -> None:
    assert Contains().grade(answer, row("Paris")) == score


@pytest.mark.parametrize("gold", [None, "", "  ", 3, [], ["a", 2]])
def test_text_gold_must_be_text(gold: Any) -> None:
    for grader in (Exact(), Contains()):
        with pytest.raises(GoldError, match="non-empty string"):
            grader.grade("x", row(gold))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,234.5", ["1234.5"]),
        ("$1,234.50", ["1234.50"]),
        ("-$5 and $-6 and −7", ["-5", "-6", "-7"]),
        ("12 %, 50%", ["12", "50"]),
        ("5km in 3h", ["5", "3"]),
        ("-3e8 m/s", ["-3e8"]),
        (".5 or 0.5", ["0.5", "0.5"]),
        ("10-5 = 5", ["10", "5", "5"]),
        ("10 - 5", ["10", "5"]),
        ("2023-11-16", ["2023", "11", "16"]),
        ("version 3.14.15", ["3.14"]),
        ("1,2,3", ["1", "2", "3"]),
        ("1,2345", ["1", "2345"]),
        ("H2O and x2", []),
        ("\\boxed{42}", ["42"]),
        ("**42**.", ["42"]),
        ("see No.5", ["5"]),
        ("(-5)", ["-5"]),
        ("+5", ["5"]),
        ("no number, nan, inf", []),
        ("1e99999", ["1"]),
    ],
)
def test_numbers_in_text(text: str, found: list[str]) -> None:
    assert numbers_in(text) == [Decimal(number) for number in found]


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("First 3, then 4: the answer is 1,200.00", 1200, 1),
        ("6", "$6.00", 1),
        ("$6 each", "6", 1),
        ("-3 degrees", -3, 1),
        ("3 degrees", -3, 0),
        ("1234567891", 1234567890, 0),
        ("0.1", 0.1, 1),
        ("I do not know", 0, 0),
        ("", 0, 0),
    ],
)
def test_number_takes_the_last_one_exactly(answer: str, gold: Any, score: float) -> None:
    assert Number().grade(answer, row(gold)) == score


def test_number_options() -> None:
    assert Number(take="first").grade("7, then 8", row(7)) == 1
    assert Number(take="only").grade("7 or 8", row(8)) == 0
    assert Number(take="only").grade("7, I say 7.0", row(7)) == 1
    assert Number(tolerance="0.5").grade("7.5", row(7)) == 1
    assert Number(tolerance="0.5").grade("7.51", row(7)) == 0
    assert Number(relative_tolerance="0.01").grade("-101", row(-100)) == 1
    assert Number(relative_tolerance="0.01").grade("-102", row(-100)) == 0


@pytest.mark.parametrize("gold", [True, None, "none", "1 or 2", [1], ""])
def test_number_gold_must_hold_one_number(gold: Any) -> None:
    with pytest.raises(GoldError, match="one number"):
        Number().grade("1", row(gold))


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(b)",
        "**B**",
        "B.",
        "B) Paris",
        "B: Paris",
        "B - because of Paris",
        "(B) Paris",
        "The answer is (B).",
        "the answer is B because A is wrong",
        "The answer is b.",
        "The correct option is **(B)**",
        "Correct choice: B",
        "Answer: B",
        "ANSWER: (b)",
        "The answer is A. No, wait: the answer is B.",
        "A) is wrong since it is hot.\nThe best choice is B",
        "Thinking about A and C.\nB",
        r"So we get $\boxed{B}$",
        r"The answer is \boxed{\text{B}}",
        "I would pick option B here",
        "I think it must be (B), as a rule",
        "It must be B",
        "`B`",
    ],
)
def test_choice_reads_the_letter(answer: str) -> None:
    assert MultipleChoice().grade(answer, row("B")) == 1
    assert MultipleChoice().grade(answer, row("C")) == 0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know",
        "A or B",
        "The answer is A or B",
        "Answer: (A) and (B)",
        "both (A) and (B)",
        "a bee",
        "Because",
        "B's",
        "X",
        "?",
    ],
)
def test_choice_refuses_what_names_no_option_or_several(answer: str) -> None:
    for gold in "AB":
        assert MultipleChoice().grade(answer, row(gold)) == 0


def test_choice_knows_the_row_s_options() -> None:
    options = row("B", choices=["Rome", "Paris"])
    assert MultipleChoice().grade("paris.", options) == 1
    assert MultipleChoice().grade("C", options) == 0
    with pytest.raises(GoldError, match="one letter of AB"):
        MultipleChoice().grade("A", row("C", choices=["Rome", "Paris"]))
    with pytest.raises(GoldError, match="one letter of XY"):
        MultipleChoice(letters="XY").grade("X", row("A"))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"a": 1, "b": [1, "x"]}', 1),
        ('{"b":[1.0,"x"],\n"a":1.00}', 1),
        ('```json\n{"a": 1, "b": [1, "x"]}\n```', 1),
        ('```\n{"a": 1, "b": [1, "x"]}\n```', 1),
        ('{"a": "1", "b": [1, "x"]}', 0),
        ('{"a": true, "b": [1, "x"]}', 0),
        ('{"a": 1, "b": ["x", 1]}', 0),
        ('{"a": 1, "b": [1]}', 0),
        ('{"a": 1}', 0),
        ('{"a": 1, "b": [1, "x"], "c": null}', 0),
        ('{"a": 2, "a": 1, "b": [1, "x"]}', 0),
        ('Sure: {"a": 1, "b": [1, "x"]}', 0),
        ('{"a": 1, "b": [1, "x"]} done', 0),
        ('{"a": 1, "b": [1, "x"]', 0),
        ("null", 0),
        ("", 0),
        ("[" * 100_000, 0),
        ("9" * 5000, 0),
        ('{"a": 1e99999, "b": [1, "x"]}', 0),
        ('{"a": NaN, "b": [1, "x"]}', 0),
    ],
)
def test_json_equality(answer: str, score: float) -> None:
    for gold in ({"a": 1, "b": [1, "x"]}, '{"a": 1, "b": [1, "x"]}'):
        assert JsonEquality().grade(answer, row(gold)) == score


def test_json_in_other_text() -> None:
    gold, free = row({"a": 1}), JsonEquality(allow_text=True)
    assert free.grade('Here it is: {"a": 1}. Anything else?', gold) == 1
    assert free.grade('Not {"a": 2} but {"a": 1}', gold) == 1
    assert free.grade('First\n```json\n{"a": 1}\n```\nas in {"a": 2}', gold) == 1
    assert free.grade('a [ b {"a": 1}', gold) == 1
    assert free.grade("none", gold) == 0
    assert free.grade("{" * 5000, gold) == 0


@pytest.mark.parametrize("part", ["[", "{", '{"a":', '["x", ', "[1,", '["', "[9", "```\n", "{} ", '{"a":1,"a":1}'])
def test_json_in_a_million_characters_of_brackets_takes_bounded_time(part: str) -> None:
    started = time.monotonic()
    assert JsonEquality(allow_text=True).grade(part * (1_000_000 // len(part)), row({"a": 1})) == 0
    assert time.monotonic() - started < 10
    long = "see [1] and [x y z] " * 20_000 + '{"a": 1}'
    assert JsonEquality(allow_text=True).grade(long, row({"a": 1})) == 1


THOUGHT = "<think>Maybe the answer is A, 7, Rome, [1].</think>"


@pytest.mark.parametrize(
    ("grader", "answer", "thought", "gold"),
    [
        (MultipleChoice, "B", "A", "B"),
        (Number, "8", "7", 8),
        (Exact, "Paris", "Rome", "Paris"),
        (Contains, "It is Paris.", "Rome", "Paris"),
        (JsonEquality, "[2]", "[1]", [2]),
    ],
)
def test_thinking_text_is_not_graded_unless_a_setting_keeps_it(
    grader: type[GraderModel], answer: str, thought: str, gold: Any
) -> None:
    assert grader().grade(THOUGHT + answer, row(gold)) == 1
    assert grader().grade(f"<think>The answer is {answer}", row(gold)) == 0  # cut off before it answered
    assert Contains(keep_thinking=True).grade(THOUGHT + answer, row("Rome")) == 1
    assert Contains().grade(THOUGHT + "Paris", row("Rome")) == 0


def test_the_number_that_counts() -> None:
    assert Number().grade(r"So \boxed{9{,}500} in 3 days", row(9500)) == 1
    assert [Number().grade("1/2", row(gold)) for gold in (2, 1, 0.5, "1/2")] == [0, 0, 1, 1]
    assert [Number().grade("2^{10}", row(gold)) for gold in (10, 2, 1024)] == [0, 0, 1]
    assert [Number().grade(r"\sqrt{2}", row(gold)) for gold in (2, 1)] == [0, 0]
    assert Number().grade("The area is 25 m^2", row(25)) == 1
    again = "3 * 3 = 9\n#### 9\nQuestion: 1 + 2?\n#### 3"
    assert [Number(marker="#### ").grade(again, row(gold)) for gold in (9, 3)] == [1, 0]
    assert Number(marker="#### ").grade("The answer is 9", row(9)) == 1
    assert Number(decimal="comma").grade("1,5", row(1.5)) == Number(decimal="comma").grade("1,5", row("1,5")) == 1


def test_the_end_of_a_long_answer_is_read() -> None:
    assert MultipleChoice().grade("C " * MAX_CHARS + "\nThe answer is B", row("B")) == 1
    assert Exact().grade("x" * MAX_CHARS, row("x" * MAX_CHARS)) == 1
    assert Exact().grade("y" + "x" * MAX_CHARS, row("y" + "x" * MAX_CHARS)) == 0


def test_json_options() -> None:
    assert JsonEquality(numeric_strings=True).grade('{"a": "1.0"}', row({"a": 1})) == 1
    assert JsonEquality(numeric_strings=True).grade('{"a": "one"}', row({"a": 1})) == 0
    assert JsonEquality(tolerance="0.01").grade("[0.333]", row([1 / 3])) == 1
    assert JsonEquality().grade("[0.333]", row([1 / 3])) == 0


@pytest.mark.parametrize("gold", ["{", "Paris", '{"a": 1, "a": 2}', float("nan")])
def test_json_gold_must_be_json(gold: Any) -> None:
    with pytest.raises(GoldError, match="not JSON"):
        JsonEquality().grade("{}", row(gold))


def test_every_grader_refuses_unknown_options_and_grades_an_empty_answer_zero() -> None:
    golds = {"number": 1, "choice": "A", "json": "{}", "sql": "SELECT 1"}
    for name, grader in GRADERS.items():
        with pytest.raises(ValidationError, match="nonsense"):
            grader(nonsense=1)
        assert grader().grade("", row(golds.get(name, "x"), schema_sql="")) == 0


class Odd:
    """A grader of another package that returns what it is given."""

    def __init__(self, score: Any) -> None:
        self.score = score

    def grade(self, answer: str, row: Any) -> float:
        if isinstance(self.score, Exception):
            raise self.score
        return self.score  # type: ignore[no-any-return]


@pytest.mark.parametrize("score", [None, "1", 1.5, -0.1, float("nan"), [1], 1j])
def test_a_score_that_is_no_share_names_the_grader(score: Any) -> None:
    with pytest.raises(TaskError, match=r"grader .*\.Odd: `grade` must return a number in \[0, 1\], not "):
        score_of(Odd(score), "x", row("x"))


class Whole:
    """A grader of another package that scores an answer of one character, blanks included."""

    def grade(self, answer: str, row: Any) -> float:
        return float(len(answer) == 1)


def test_graders_of_other_packages_get_no_thinking_text() -> None:
    assert score_of(Whole(), "<think>A</think> B", row("x")) == 1
    assert score_of(Whole(), " B", row("x")) == 0


def test_what_a_grader_raises_names_it() -> None:
    with pytest.raises(TaskError, match=r"grader .*\.Odd: `grade` raised KeyError: 'note'"):
        score_of(Odd(KeyError("note")), "x", row("x"))
    with pytest.raises(GoldError, match="unusable"):
        score_of(Odd(GoldError("unusable")), "x", row("x"))
    assert [score_of(Odd(score), "x", row("x")) for score in (True, 0, 0.5)] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("sign", ["%", " %", "\u00a0%", "\\%", "％", "٪", " percent", " Prozent", " per cent", "‰"])
def test_a_percent_sign_changes_no_number(sign: str) -> None:
    for gold in ("50", 50, 50.0, "50%", "50 %"):
        assert Number().grade(f"It is 50{sign}.", row(gold)) == 1
        assert Number().grade("It is 0.5.", row(gold)) == Number().grade("It is 1/2.", row(gold)) == 0
    for gold in ("0.5", 0.5, "1/2"):
        assert Number().grade(f"It is 50{sign}.", row(gold)) == 0
        assert Number().grade("0.5", row(gold)) == 1


def test_graders_of_text_and_json_keep_the_percent_sign() -> None:
    for grader in (Exact(), Contains()):
        assert grader.grade("50%", row("50%")) == 1 and grader.grade("0.5", row("50%")) == 0
    assert Exact().grade("50 %", row("50%")) == Exact().grade("50", row("50%")) == 0
    assert Exact().grade("50 %", row(["50%", "50 %"])) == 1
    strings = JsonEquality(numeric_strings=True)
    assert strings.grade('{"share": "50%"}', row({"share": "50%"})) == 1
    assert strings.grade('{"share": 50}', row({"share": "50%"})) == strings.grade('"50%"', row(0.5)) == 0
