"""Requests refuse impossible values and determine how many tokens an answer may have."""

from typing import Any

import pytest

from coe.errors import ContextLengthExceeded, InvalidRequest
from coe.sampling import SamplingOptions
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


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, set()),
        ({"tools": ({"type": "function"},)}, {"tools"}),
        ({"tools": ({"type": "function"},), "tool_choice": "none"}, set()),
        ({"json_schema": {"schema": {}}, "format": "json"}, {"json_schema"}),
        ({"logprobs": 0, "prompt_logprobs": 1}, {"logprobs", "prompt_logprobs"}),
        ({"prompt_ids": (1, 2)}, {"token_prompts"}),
        ({"sampling": SamplingOptions(top_k=5)}, {"sampling"}),
        ({"sampling": SamplingOptions()}, set()),
    ],
)
def test_a_request_needs_the_capabilities_of_what_it_asks_for(fields: dict[str, Any], needs: set[str]) -> None:
    assert GenerateRequest((Message("user", "hi"),), **fields).needs == needs


def test_no_new_tokens_are_a_limit_only_where_the_prompt_is_the_answer() -> None:
    assert GenerateRequest(prompt="hi", echo=True, max_tokens=0).token_limit(3, 3, expert="e") == 0
    with pytest.raises(InvalidRequest, match="at least 1"):
        GenerateRequest(prompt="hi", max_tokens=0)
