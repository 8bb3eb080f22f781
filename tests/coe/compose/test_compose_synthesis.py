"""The prompt of an aggregator, word for word."""

import pytest

from coe.answers.thinking import without_thoughts
from coe.compose.synthesis import TEMPLATE, check_template, shortened, synthesis
from coe.errors import ConfigError
from coe.types import GenerateRequest
from routers.base import Message


def test_the_last_user_message_holds_the_question_and_the_numbered_answers():
    conversation = (Message("system", "Be short."), Message("user", "2 + 2?"), Message("assistant", "4"))
    request = GenerateRequest(messages=(*conversation, Message("user", "And 3?")), temperature=0.5, max_tokens=9)
    asked = synthesis(request, ["6", "9"])
    assert asked.messages[:-1] == conversation and (asked.temperature, asked.max_tokens) == (0.5, 9)
    assert asked.messages[-1].content == (
        "And 3?\n\nExperts answered:\n1. 6\n2. 9\n\n"
        "Some of these answers may be wrong or incomplete. Reply with the one final answer only."
    )


def test_a_raw_prompt_and_a_conversation_without_a_user():
    assert synthesis(GenerateRequest(prompt="once"), ["a"], "{answers} | {question}").prompt == "1. a | once"
    system = Message("system", "Say something.")
    assert synthesis(GenerateRequest(messages=(system,)), ["a"], "{question}{answers}").messages == (
        system,
        Message("user", "1. a"),
    )


def test_questions_and_answers_that_look_like_places_stay_as_they_are():
    request = GenerateRequest(prompt="What is {answers}?")
    assert synthesis(request, ["{question}"], "{question}\n{answers}").prompt == "What is {answers}?\n1. {question}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>hm</think> 42", "42"),
        ("hm</think>no</think>\n42 ", "42"),
        ("<think>it never ends", ""),
        ("42 <think>unsure", "42"),
        ("plain", "plain"),
    ],
)
def test_thoughts_are_dropped(text: str, said: str):
    assert without_thoughts(text) == said


def test_an_answer_that_is_too_long_is_cut_and_says_so():
    assert shortened("12345", 5) == "12345"
    assert shortened("1234 6", 5) == "1234 [cut]"


def test_a_template_needs_both_places_once():
    check_template(TEMPLATE)
    for wrong in ("{question}", "{answers} only", "{question}{question}{answers}"):
        with pytest.raises(ConfigError, match=r"must contain \{(question|answers)\} exactly once"):
            check_template(wrong)
