"""Requests refuse impossible values and determine how many tokens an answer may have."""

import pytest

from coe.errors import ContextLengthExceeded, InvalidRequest
from coe.types import DEFAULT_MAX_TOKENS, GenerateRequest
from routers.base import Message

HELLO = (Message("user", "hello"),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either messages or prompt"),
        ({"messages": HELLO, "prompt": "x"}, "either messages or prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature must lie in"),
        ({"prompt": "x", "temperature": -0.1}, "temperature must lie in"),
        ({"prompt": "x", "top_p": 0.0}, "top_p must lie in"),
        ({"prompt": "x", "stop": ("a", "")}, "stop strings must not be empty"),
        ({"prompt": "x", "deadline_s": 0.0}, "deadline_s must be positive"),
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        GenerateRequest(**fields)  # type: ignore[arg-type]


def test_a_stated_limit_is_kept_and_refused_with_both_numbers_where_it_does_not_fit() -> None:
    request = GenerateRequest(messages=HELLO, max_tokens=30)
    assert request.token_limit(70, 100, expert="small") == 30
    with pytest.raises(ContextLengthExceeded, match="71 tokens and max_tokens is 30, but 'small' has a context of 100"):
        request.token_limit(71, 100, expert="small")


def test_without_a_limit_the_answer_takes_what_the_context_leaves() -> None:
    request = GenerateRequest(messages=HELLO)
    assert request.token_limit(70, 100, expert="small") == 30
    assert request.token_limit(70, 100_000, expert="large") == DEFAULT_MAX_TOKENS
    with pytest.raises(ContextLengthExceeded, match="100 tokens and max_tokens is 1"):
        request.token_limit(100, 100, expert="small")
