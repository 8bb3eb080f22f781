"""OpenAI's requests: which fields are used, refused and ignored, and the errors for invalid ones."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import chat_completion_message_param as turns
from openai.types.chat import completion_create_params as chat_create_params

from coe.errors import InvalidRequest
from coe.protocol import fields
from coe.protocol.errors import InvalidFields
from coe.protocol.messages import Turn
from coe.protocol.parsed import Parsed
from coe.protocol.requests import parse_chat, parse_completion
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from routers.base import Message, Query

HELLO = [{"role": "user", "content": "hello"}]


def chat(**given: Any) -> Parsed:
    return parse_chat({"model": "auto", "messages": HELLO, **given})


def completion(**given: Any) -> Parsed:
    return parse_completion({"model": "auto", "prompt": "Once", **given})


def problems(parse: Any, **given: Any) -> dict[str, str]:
    with pytest.raises(InvalidFields) as caught:
        parse(**given)
    return {problem.param: problem.message for problem in caught.value.problems}


def said(part: object) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


def test_a_bare_chat_request_is_greedy_and_whole() -> None:
    parsed = chat()
    assert parsed == Parsed(
        "auto", GenerateRequest(messages=(Message("user", "hello"),), stream=False), Query.of("hello")
    )


def test_every_used_field_of_a_chat_request_arrives() -> None:
    parsed = chat(
        model="coe/frugal",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": []},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
        ],
        max_completion_tokens=7,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop="END",
        seed=-3,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": True},
        response_format={"type": "json_object"},
        user="u",
        store=False,
        metadata=None,
        coe={"experts": ["x", "y"], "exclude": ["y"], "cost_weight": 2, "seed": 5, "deadline_s": 1.5},
    )
    messages = (
        Message("system", "Be brief."),
        Message("user", "ab", name="Ann"),
        Message("assistant", "c"),
        Message("tool", "d", tool_call_id="1"),
    )
    assert parsed.request == GenerateRequest(
        messages=messages,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop=("END",),
        seed=-3,
        deadline_s=1.5,
        stream=True,
        format="json",
    )
    assert parsed.query == Query(
        messages, format="json", allowed=frozenset({"x", "y"}), cost_weight=2.0, seed=5, max_tokens=7
    )
    assert parsed.model == "coe/frugal" and parsed.stream and parsed.include_usage
    assert parsed.ignored == ("store", "stream_options.include_obfuscation", "user")
    assert parsed.query_among(["x", "y", "z"]).allowed == {"x"}


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
def test_a_completion_continues_its_prompt(prompt: object) -> None:
    parsed = completion(prompt=prompt, stop=["a", "b"], max_tokens=3, user="u")
    assert parsed.request == GenerateRequest(prompt="Once", stop=("a", "b"), max_tokens=3, stream=False)
    assert parsed.query == Query.of("Once", max_tokens=3, raw=True) and parsed.ignored == ("user",)


def test_nulls_are_defaults() -> None:
    names = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options")
    nulls = dict.fromkeys([*names, "coe", "response_format", *fields.REFUSED_IN_CHAT, *fields.IGNORED_IN_CHAT])
    assert chat(**nulls) == chat()


NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "logprobs": False,
    "tools": [],
    "tool_choice": "auto",
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "verbosity": "medium",
}


def test_what_is_refused_may_be_sent_at_its_default() -> None:
    assert chat(**NEUTRAL) == chat()
    assert completion(best_of=1, echo=False, suffix="", n=1) == completion()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("functions", [{}], "functions: [{}] is not supported here, only []; send tools"),
        (
            "function_call",
            {"name": "f"},
            'function_call: {"name": "f"} is not supported here, only "none"; send tool_c',
        ),
        ("audio", {"voice": "x"}, "audio: "),
        ("modalities", ["text", "audio"], "modalities: "),
        ("prediction", {"type": "content"}, "prediction: "),
        ("web_search_options", {}, "web_search_options: {} is not supported here: leave it out"),
        ("moderation", {"model": "m"}, "moderation: "),
    ],
)
def test_what_would_change_the_answer_and_is_not_done_is_refused_by_name(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(InvalidFields) as caught:
        chat(**{name: value})
    assert str(caught.value).startswith(message)
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", 2), ("suffix", "end"), ("prompt_logprobs", 1), ("chat_template_kwargs", {"x": 1})]
)
def test_a_completion_refuses_by_name_too(name: str, value: object) -> None:
    assert list(problems(completion, **{name: value})) == [name]


def test_fields_of_other_servers_pass_at_their_neutral_values() -> None:
    neutral = {name: values[-1] for name, values in fields.OF_ENGINES.items()}
    neutral |= {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0, "ignore_eos": False}
    assert chat(**neutral, echo=False) == chat()
    assert completion(**neutral) == completion()
    nulls = dict.fromkeys(neutral)
    assert chat(**nulls) == chat() and completion(**nulls) == completion()
    assert chat(top_k=-1, temperature=0.7) == chat(temperature=0.7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_beam_search", True),
        ("continue_final_message", True),
        ("stop_token_ids", [7]),
        ("bad_words", ["x"]),
        ("priority", 1),
        ("priority", False),
        ("top_k", "5"),
    ],
)
def test_fields_of_other_servers_that_would_change_the_answer_are_refused(name: str, value: object) -> None:
    for parse in (chat, completion):
        assert list(problems(parse, **{name: value})) == [name]


def test_a_sampling_field_has_no_effect_at_temperature_0_and_is_named() -> None:
    for greedy in ({}, {"temperature": 0}, {"temperature": None}, {"temperature": 0.0}):
        parsed = chat(top_k=40, min_p=0.1, **greedy)
        assert parsed.ignored == ("min_p", "top_k") and parsed.request == chat().request
    sampled = chat(top_k=40, min_p=0.1, temperature=0.7)
    assert sampled.request.sampling == SamplingOptions(top_k=40, min_p=0.1) and not sampled.ignored


def test_what_a_harness_leaves_in_a_history_passes_and_is_named() -> None:
    cached = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    parsed = chat(
        messages=[
            {"role": "user", "content": [cached, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "reasoning_content": "hm", "reasoning": None},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "user", "content": "d", "cache_control": {"type": "ephemeral"}},
        ],
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert [message.content for message in parsed.request.messages] == ["ab", "c", "", "d"]
    assert [message.reasoning for message in parsed.request.messages] == ["", "hm", "", ""]
    assert parsed.ignored == (
        "messages[].cache_control",
        "messages[].content[].cache_control",
        "stream_options.continuous_usage_stats",
    )
    given = {"include_usage": True, "continuous_usage_stats": False}
    assert chat(stream=True, stream_options=given).ignored == ()


@pytest.mark.parametrize("given", [{}, {"content": None}, {"content": ""}, {"content": []}, {"tool_calls": None}])
def test_an_assistant_turn_may_be_empty(given: dict[str, Any]) -> None:
    parsed = chat(messages=[*HELLO, {"role": "assistant", **given}, *HELLO])
    assert parsed.request.messages == (*chat().request.messages, Message("assistant", ""), *chat().request.messages)
    assert parsed.query.messages == parsed.request.messages
    assert parsed.ignored == ()


@pytest.mark.parametrize(
    ("turn", "param", "message"),
    [
        (said({"type": "input_audio", "input_audio": {}}), "messages[0].content[0]", "parts of type 'input_audio' are"),
        (said({"type": "file", "file": {}}), "messages[0].content[0]", "'file' are not supported, only text and image"),
        (said({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url", "is required"),
        (said({"text": "x"}), "messages[0].content[0].type", "is required"),
        (said({"type": "text", "txt": "x", "text": "x"}), "messages[0].content[0].txt", "did you mean 'text'"),
        ({"role": "user", "content": 3}, "messages[0].content", "should be a string or an array of parts"),
        ({"role": "user", "content": None}, "messages[0].content", "got null"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function",
         "is required"),
        ({"role": "function", "content": "x"}, "messages[0].role", "'developer'"),
        ({"role": "user", "contents": "x", "content": "x"}, "messages[0].contents", "did you mean 'content'"),
        ({"role": "user"}, "messages[0].content", "is required"),
        ({"role": "system"}, "messages[0].content", "is required"),
        ({"role": "tool", "tool_call_id": "c", "content": None}, "messages[0].content", "got null"),
        ("hello", "messages[0]", 'should be an object, got "hello"'),
        ({"role": "user", "content": "\ud800"}, "messages[0].content[0].text", "is not text: surrogates not allowed"),
    ],
)  # fmt: skip
def test_wrong_messages_say_where_and_what(turn: object, param: str, message: str) -> None:
    found = problems(chat, messages=[turn])
    assert list(found) == [param] and message in found[param]


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", 'should be a valid number, got "hot"'),
        ({"temperature": 3}, "temperature", "should be less than or equal to 2, got 3"),
        ({"temperature": float("nan")}, "temperature", "should be a finite number"),
        ({"max_tokens": 1.5}, "max_tokens", "should be a valid integer, got 1.5"),
        ({"max_tokens": 0}, "max_tokens", "should be greater than or equal to 1, got 0"),
        ({"max_tokens": True}, "max_tokens", "should be a valid integer, got true"),
        ({"stream": "yes"}, "stream", 'should be a valid boolean, got "yes"'),
        ({"stop": [""]}, "stop[0]", "must not be empty"),
        ({"stop": 5}, "stop", "should be a valid list, got 5"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hello"}, "messages", 'should be a valid list, got "hello"'),
        ({"model": 5}, "model", "should be a valid string, got 5"),
        ({"seed": 2**63}, "seed", "should be less than"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"stream_options": {"include_usage": True}}, "stream_options", 'only goes with "stream": true'),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "did you mean 'include_usage'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "is not a known field"),
        ({"temprature": 1}, "temprature", "is not a known field; did you mean 'temperature'?"),
        ({"toools": []}, "toools", "did you mean 'tools'"),
        ({"usr": "x"}, "usr", "did you mean 'user'"),
        ({"coe": {"expert": ["x"]}}, "coe.expert", "did you mean 'experts'"),
        ({"coe": {"cost_weight": -1}}, "coe.cost_weight", "should be greater than or equal to 0, got -1"),
        ({"coe": {"deadline_s": 0}}, "coe.deadline_s", "should be greater than 0, got 0"),
        ({"coe": {"experts": []}}, "coe.experts", "must not be empty"),
        ({"coe": []}, "coe", "should be an object, got []"),
        ({"coe": {"session": "sql"}}, "coe.session", "should be an object"),
        ({"coe": {"session": {"exprt": "sql"}}}, "coe.session.exprt", "did you mean 'expert'"),
        ({"coe": {"session": {"expert": 3}}}, "coe.session.expert", "should be a valid string, got 3"),
    ],
)  # fmt: skip
def test_wrong_fields_say_what_was_got_and_what_is_expected(given: dict[str, Any], param: str, message: str) -> None:
    found = problems(chat, **given)
    assert list(found) == [param] and message in found[param]


def test_all_problems_are_told_at_once_and_the_first_names_the_field() -> None:
    with pytest.raises(InvalidFields) as caught:
        parse_chat({"messages": HELLO, "temperature": "hot", "audio": {}})
    assert str(caught.value).splitlines() == [
        "3 problems:",
        "model: is required",
        'temperature: should be a valid number, got "hot"',
        "audio: {} is not supported here: leave it out",
    ]
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize("body", [[], "text", None, 3])
def test_a_body_must_be_an_object(body: object) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(InvalidRequest, match="must be a JSON object"):
            parse(body)


def test_unknown_experts_are_refused_with_close_matches_and_somebody_must_be_left() -> None:
    parsed = chat(coe={"experts": ["sq1", "dates"], "exclude": ["datez"]})
    with pytest.raises(InvalidFields) as caught:
        parsed.query_among(["sql", "dates"])
    assert [str(problem) for problem in caught.value.problems] == [
        "coe.experts: 'sq1' is not registered; did you mean 'sql'?",
        "coe.exclude: 'datez' is not registered; did you mean 'dates'?",
    ]
    with pytest.raises(InvalidFields, match="excludes every allowed expert"):
        chat(coe={"exclude": ["a", "b"]}).query_among(["a", "b"])
    assert chat(coe={"exclude": ["a"]}).query_among(["a", "b"]).allowed == {"b"}
    assert chat().query_among(["a"]).allowed is None


def test_the_expert_of_the_session_is_read_and_must_be_registered() -> None:
    parsed = chat(coe={"session": {"expert": "sq1"}})
    assert parsed.query.previous == "sq1" and parsed.query.allowed is None
    with pytest.raises(InvalidFields, match=r"coe\.session\.expert: 'sq1' is not registered; did you mean 'sql'\?"):
        parsed.query_among(["sql", "dates"])
    assert parsed.query_among(["sq1"]) is parsed.query
    assert chat(coe={"session": {}}).query.previous is None


def known(model: type, *more: Any) -> set[str]:
    return set(model.model_fields).union(*more)  # type: ignore[attr-defined]


def test_every_parameter_of_the_client_is_used_refused_or_ignored_by_name() -> None:
    params = chat_create_params
    documented = {
        *params.CompletionCreateParamsNonStreaming.__annotations__,
        *params.CompletionCreateParamsStreaming.__annotations__,
    }
    own = {"coe", *fields.EngineFields.__annotations__}
    assert documented == known(fields.ChatFields, fields.REFUSED_IN_CHAT, fields.IGNORED_IN_CHAT) - own
    documented = {
        *completion_create_params.CompletionCreateParamsNonStreaming.__annotations__,
        *completion_create_params.CompletionCreateParamsStreaming.__annotations__,
    }
    assert (
        documented == known(fields.CompletionFields, fields.REFUSED_IN_COMPLETIONS, fields.IGNORED_IN_COMPLETIONS) - own
    )


def test_every_field_of_a_message_of_the_client_is_known() -> None:
    kinds = turns.ChatCompletionMessageParam.__args__
    documented = {name for kind in kinds for name in kind.__annotations__}
    taken = known(Turn, fields.REFUSED_IN_MESSAGES, fields.IGNORED_IN_MESSAGES)
    assert documented <= taken, documented - taken


def test_no_field_is_in_two_lists() -> None:
    for model, refused, ignored in (
        (fields.ChatFields, fields.REFUSED_IN_CHAT, fields.IGNORED_IN_CHAT),
        (fields.CompletionFields, fields.REFUSED_IN_COMPLETIONS, fields.IGNORED_IN_COMPLETIONS),
        (Turn, fields.REFUSED_IN_MESSAGES, fields.IGNORED_IN_MESSAGES),
    ):
        names = [*model.model_fields, *refused, *ignored]
        assert len(names) == len(set(names))
