"""Prompts, numbers of answers, log-probabilities and sampling options: parsed, refused with their place."""

from __future__ import annotations

from typing import Any

import pytest

from coe.protocol import bounds
from coe.protocol.errors import InvalidFields
from coe.protocol.parsed import Parsed
from coe.protocol.requests import parse_chat, parse_completion
from coe.sampling import SamplingOptions
from routers.base import Message
from routers.constraints import LOGPROBS, PROMPT_LOGPROBS, SAMPLING, TOKEN_PROMPTS


def chat(**given: Any) -> Parsed:
    return parse_chat({"model": "auto", "messages": [{"role": "user", "content": "hi"}], **given})


def completion(**given: Any) -> Parsed:
    return parse_completion({"model": "auto", "prompt": "Once", **given})


def refused(parse: Any, **given: Any) -> dict[str, str]:
    with pytest.raises(InvalidFields) as caught:
        parse(**given)
    return {problem.param: problem.message for problem in caught.value.problems}


def test_several_prompts_are_as_many_requests_and_queries() -> None:
    parsed = completion(prompt=["a", "b", ""], max_tokens=3, n=2, coe={"exclude": ["x"]})
    assert [request.prompt for request in parsed.requests] == ["a", "b", ""]
    assert {request.max_tokens for request in parsed.requests} == {3} and (parsed.n, parsed.size) == (2, 6)
    queries = parsed.queries_among(["x", "y"])
    assert [query.messages for query in queries] == [(Message("user", text),) for text in ("a", "b", "")]
    assert all(query.allowed == {"y"} and query.raw for query in queries)


def test_token_ids_are_a_prompt() -> None:
    for prompt in ([5, 0, 2**31 - 1], [[5, 0, 2**31 - 1]]):
        parsed = completion(prompt=prompt)
        assert parsed.request.prompt_ids == (5, 0, 2**31 - 1) and parsed.request.prompt == "" and not parsed.others
        assert parsed.query.needs == {TOKEN_PROMPTS}
    assert [request.prompt_ids for request in completion(prompt=[[1], [2, 3]]).requests] == [(1,), (2, 3)]


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (None, "prompt", "should be a string, an array of strings"),
        ([], "prompt", "got []"),
        (5, "prompt", "got 5"),
        ({}, "prompt", "got {}"),
        ([None], "prompt[0]", "should be a string, or an array of token ids"),
        (["a", 5], "prompt[1]", "should be a string, as the first prompt is"),
        (["a", "\ud800"], "prompt[1]", "is not text"),
        ("\ud800", "prompt", "is not text"),
        ([1, "a"], "prompt[1]", "should be a token id: a whole number from 0 to 2,147,483,647"),
        ([1, True], "prompt[1]", "should be a token id"),
        ([True], "prompt[0]", "should be a token id"),
        ([1, -1], "prompt[1]", "should be a token id"),
        ([1.0], "prompt[0]", "should be a token id"),
        ([2**31], "prompt[0]", "should be a token id"),
        ([[1], []], "prompt[1]", "must not be empty"),
        ([[1], [2, None]], "prompt[1][1]", "should be a token id"),
        ([[1], "a"], "prompt[1]", "should be a string, or an array of token ids"),
        (["a"] * (bounds.MOST_ANSWERS + 1), "prompt", "has 129 prompts, at most 128 are read"),
        ([[7]] * (bounds.MOST_ANSWERS + 1), "prompt", "has 129 prompts"),
        ([[7] * bounds.MOST_PROMPT_IDS, [7]], "prompt", "has 131,073 token ids, at most 131,072 are read"),
        ([7] * (bounds.MOST_PROMPT_IDS + 1), "prompt", "has 131,073 elements, at most 131,072 are read"),
    ],
)
def test_wrong_prompts_say_where_and_what(prompt: object, param: str, message: str) -> None:
    found = refused(completion, prompt=prompt)
    assert list(found) == [param] and message in found[param]


def test_the_most_prompts_and_token_ids_are_taken() -> None:
    assert completion(prompt=["a"] * bounds.MOST_ANSWERS).size == bounds.MOST_ANSWERS
    ids = completion(prompt=[[7] * (bounds.MOST_PROMPT_IDS - 1), [7]])
    assert sum(len(request.prompt_ids) for request in ids.requests) == bounds.MOST_PROMPT_IDS


def test_the_number_of_answers_is_bounded_over_all_prompts() -> None:
    assert chat(n=128).n == 128 and chat(n=None) == chat(n=1) == chat()
    assert completion(n=64, prompt=["a", "b"]).size == 128
    for n in (0, 129, 200):
        assert list(refused(chat, n=n)) == list(refused(completion, n=n)) == ["n"]
    assert "should be a valid integer, got true" in refused(chat, n=True)["n"]
    assert refused(completion, n=65, prompt=["a", "b"])["n"].startswith("65 answers to each of 2 prompts are 130;")
    assert completion(n=3, best_of=3) == completion(n=3)
    assert refused(completion, n=2, best_of=3) == {"best_of": "3 is not supported here, only n, which is 2"}


def test_echo_and_log_probabilities_of_a_completion() -> None:
    assert completion(echo=True).request.echo and not completion(echo=False).request.echo
    scored = completion(logprobs=5, echo=True, max_tokens=0)
    assert (scored.request.logprobs, scored.request.prompt_logprobs, scored.request.max_tokens) == (5, 5, 0)
    assert scored.query.needs == {LOGPROBS, PROMPT_LOGPROBS}
    generated = completion(logprobs=0)
    assert (generated.request.logprobs, generated.request.prompt_logprobs) == (0, None)
    assert "less than or equal to 5, got 6" in refused(completion, logprobs=6)["logprobs"]
    assert "should be a valid integer, got true" in refused(completion, logprobs=True)["logprobs"]
    assert refused(completion, max_tokens=0) == {
        "max_tokens": 'should be greater than or equal to 1, got 0: 0 only goes with "echo": true'
    }
    assert list(refused(chat, echo=True)) == ["echo"]


def test_sampling_options_arrive() -> None:
    given = {
        "temperature": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "0": 100.0},
        "min_tokens": 3,
        "ignore_eos": True,
    }
    wanted = SamplingOptions(40, 0.1, -2.0, 2.0, 1.1, {5: -100.0, 0: 100.0}, 3, True)
    for parse in (chat, completion):
        parsed = parse(**given)
        assert parsed.request.sampling == wanted and parsed.query.needs == {SAMPLING} and not parsed.ignored
    assert chat(temperature=0.5, top_k=-1, logit_bias={}, frequency_penalty=0).request.sampling == SamplingOptions()


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -2.1}, "presence_penalty", "greater than or equal to -2"),
        ({"presence_penalty": float("nan")}, "presence_penalty", "finite"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"repetition_penalty": 100.1}, "repetition_penalty", "less than or equal to 100"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 1.5}, "top_k", "should be a valid integer"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "5 exceeds max_tokens, which is 4"),
        ({"ignore_eos": 1}, "ignore_eos", "should be a valid boolean"),
        ({"logit_bias": [1]}, "logit_bias", "should be an object"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "should be a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "should be a token id"),
        ({"logit_bias": {"٣": 1}}, "logit_bias.٣", "should be a token id"),
        ({"logit_bias": {"1234567890": 1}}, "logit_bias.1234567890", "should be a token id"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1", "should be a valid number"),
    ],
)
def test_wrong_sampling_options_say_where_and_what(given: dict[str, Any], param: str, message: str) -> None:
    for parse in (chat, completion):
        found = refused(parse, **given)
        assert list(found) == [param] and message in found[param]
