"""Answer keys: which answers are equal under different wording."""

import pytest

from coe.compose.answer_key import MAX_KEY_CHARS, KeyKind, auto, key_of
from coe.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [
        ("choice", "Let me think. The answer is (B).", "B"),
        ("choice", "**c**", "C"),
        ("choice", "It is A or B", None),
        ("choice", "I cannot say.", None),
        ("number", "6 * 7 = 42.0", "42"),
        ("number", "That makes $1,200.50 in all", "1200.5"),
        ("number", "none at all", None),
        ("text", "  Paris.\n", "paris"),
        ("text", "PARIS", "paris"),
        ("text", "cafe\u0301", "café"),
        ("text", " \n", None),
        ("auto", "", None),
        ("auto", "   ", None),
        ("auto", "B", "B"),
        ("auto", "(b)", "B"),
        ("auto", "**B**", "B"),
        ("auto", "B) Paris", "B"),
        ("auto", "Because of x, the answer is (B).", "B"),
        ("auto", "First 3, then 4.\n#### 12", "12"),
        ("auto", "so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("auto", "Thus \\boxed{12.0}.", "12"),
        ("auto", "Answer: 1,200", "1200"),
        ("auto", "$1,200.00", "1200"),
        ("auto", "42%", "42"),
        ("auto", "Paris", "paris"),
        ("auto", "The answer is **Paris**.", "paris"),
        ("auto", "A cat.", "a cat"),
        ("auto", "Apollo 11", "apollo 11"),
        ("auto", "the answer is 5\nwait, the answer is 6", "6"),
        ("auto", '{"b": 1, "a": [2]}', '{"a": [2], "b": 1}'),
        ("auto", "{not json}", "{not json}"),
    ],
)
def test_the_key_of_an_answer(kind: KeyKind, text: str, key: str | None) -> None:
    assert key_of(kind)(text) == key


@pytest.mark.parametrize(
    ("one", "other"),
    [("B", "The answer is B."), ("12", "... so the answer is 12.00"), ("Paris", "Answer: paris"), ("[1, 2]", "[1,2]")],
)
def test_differently_worded_answers_agree(one: str, other: str) -> None:
    assert auto(one) == auto(other) is not None


@pytest.mark.parametrize("text", ["I don't know.", "No idea", "我不知道。", "<think>Paris?</think>Je ne sais pas."])
@pytest.mark.parametrize("kind", ["auto", "choice", "number", "text"])
def test_refusals_have_no_key(kind: KeyKind, text: str) -> None:
    assert key_of(kind)(text) is None


@pytest.mark.parametrize(
    "text",
    ["A because it fits", "So, A it is.", "A is correct.", "I choose A", "Option B is incorrect. Option A is correct."],
)
def test_votes_read_options_as_graders_do(text: str) -> None:
    assert key_of("auto")(text) == key_of("choice")(text) == "A"


def test_a_key_is_read_from_the_end_of_a_long_answer() -> None:
    assert key_of("number")("7 " + "x" * (MAX_KEY_CHARS - 2)) == "7"
    assert key_of("number")("7 " + "x" * (MAX_KEY_CHARS - 1)) is None


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="no answer key 'letter'; there are: auto, choice, number, text"):
        key_of("letter")  # type: ignore[arg-type]
