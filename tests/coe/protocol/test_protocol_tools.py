"""Tools, tool calls in a history, images, reasoning, and formats of the answer: parsed, refused with their place."""

from __future__ import annotations

from typing import Any

import pytest

from coe.protocol import bounds
from coe.protocol.errors import InvalidFields
from coe.protocol.parsed import Parsed
from coe.protocol.requests import parse_chat
from routers.base import Message, ToolCall
from routers.constraints import JSON_SCHEMA, TOOLS, VISION

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": SCHEMA}}
NEWS = {"type": "function", "function": {"name": "news"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
PNG = "data:image/png;base64,iVBORw0KGgo="


def chat(*turns: dict[str, Any], **given: Any) -> Parsed:
    return parse_chat({"model": "auto", "messages": list(turns) or [{"role": "user", "content": "hi"}], **given})


def refused(*turns: dict[str, Any], **given: Any) -> dict[str, str]:
    with pytest.raises(InvalidFields) as caught:
        chat(*turns, **given)
    return {problem.param: problem.message for problem in caught.value.problems}


def image(url: object, **more: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": url}],
        **more,
    }


def test_tools_reach_the_request_and_only_experts_with_tools_may_answer() -> None:
    parsed = chat(tools=[WEATHER, NEWS | {"cache_control": {"type": "ephemeral"}}], parallel_tool_calls=False)
    assert parsed.request.tools == (WEATHER, NEWS) and parsed.query.tools == (WEATHER, NEWS)
    assert (parsed.request.tool_choice, parsed.request.tool_name) == ("auto", None)
    assert parsed.request.parallel_tool_calls is False and parsed.query.needs == {TOOLS} and not parsed.ignored
    nulls = {"type": "function", "function": {"name": "news", "description": None, "parameters": None, "strict": None}}
    assert chat(tools=[nulls]).request.tools == (NEWS,)
    strict = {"type": "function", "function": {"name": "a.b-c:d/e", "strict": True, "parameters": {}}}
    assert chat(tools=[strict]).request.tools == (strict,)


@pytest.mark.parametrize(
    ("choice", "mode", "name"),
    [
        ("auto", "auto", None),
        (None, "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "function": {"name": "news"}}, "required", "news"),
    ],
)
def test_the_choice_of_a_tool(choice: object, mode: str, name: str | None) -> None:
    parsed = chat(tools=[WEATHER, NEWS], tool_choice=choice)
    assert (parsed.request.tool_choice, parsed.request.tool_name) == (mode, name)
    assert parsed.query.needs == (frozenset() if mode == "none" else {TOOLS})


def test_neutral_tool_fields_request_nothing() -> None:
    plain = chat()
    assert chat(tools=[], tool_choice="auto", functions=[], function_call=None) == plain
    assert chat(tools=None, tool_choice="none") == plain
    assert chat(parallel_tool_calls=True).ignored == ("parallel_tool_calls",)


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"tools": "x"}, "tools", "should be a valid list"),
        ({"tools": [WEATHER, 5]}, "tools[1]", "should be an object, got 5"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]", "only tools of type 'function' are supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        ({"tools": [{"function": {"name": "x"}}]}, "tools[0].type", "is required"),
        ({"tools": [WEATHER | {"functions": 1}]}, "tools[0].functions", "did you mean 'function'"),
        ({"tools": [_ := {"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "should match"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools[0].function.name", "should match"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": "{}"}}]},
         "tools[0].function.parameters", "should be an object"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters", 'should be the JSON schema of an object: {"type": "object"'),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"properties": ["a"]}}}]},
         "tools[0].function.parameters", "its properties should be an object"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": 5}}}}]},
         "tools[0].function.parameters", "each of its properties"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"required": [1]}}}]},
         "tools[0].function.parameters", "its required should be an array of names"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameter": {}}}]},
         "tools[0].function.parameter", "did you mean 'parameters'"),
        ({"tools": [NEWS, WEATHER, NEWS]}, "tools[2].function.name", "'news' is the name of tools[0], too"),
        ({"tools": [NEWS], "tool_choice": "any"}, "tool_choice", 'should be "auto", "none", "required", or {"type"'),
        ({"tools": [NEWS], "tool_choice": ["auto"]}, "tool_choice", "should be"),
        ({"tools": [NEWS], "tool_choice": {"type": "tool", "name": "news"}}, "tool_choice.type", "'function'"),
        ({"tools": [NEWS], "tool_choice": {"type": "function", "function": {"name": "nws"}}},
         "tool_choice.function.name", "'nws' is the name of no tool; did you mean 'news'?"),
        ({"tools": [NEWS], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
         "tool_choice", "type 'allowed_tools' is not supported: send only these tools"),
        ({"tool_choice": "required"}, "tool_choice", "requires a call, but tools is empty"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "but tools is empty"),
        ({"tools": [NEWS], "parallel_tool_calls": "no"}, "parallel_tool_calls", "should be a valid boolean"),
        ({"functions": [{"name": "x"}]}, "functions", "only []; send tools"),
    ],
)  # fmt: skip
def test_wrong_tools_say_where_and_what(given: dict[str, Any], param: str, message: str) -> None:
    found = refused(**given)
    assert param in found and message in found[param]


def test_a_history_with_tool_calls_and_results_is_kept_whole() -> None:
    parsed = chat(
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "warm"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "hot", "name": "weather"},
        {"role": "assistant", "content": "It is hot.", "tool_calls": []},
        tools=[WEATHER],
    )
    call = ToolCall("c1", "weather", '{"city": "Rome"}')
    assert parsed.request.messages == (
        Message("user", "weather?"),
        Message("assistant", "", (call,)),
        Message("tool", "warm", tool_call_id="c1"),
        Message("assistant", "", (call,)),
        Message("tool", "hot", tool_call_id="c1", name="weather"),
        Message("assistant", "It is hot."),
    )
    assert not parsed.ignored


def test_arguments_that_a_client_parsed_become_text_again() -> None:
    call = {"id": "c1", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    [message] = chat({"role": "assistant", "content": "", "tool_calls": [call]}).request.messages
    assert message.tool_calls == (ToolCall("c1", "weather", '{"city": "Köln"}'),)


def test_what_clients_leave_null_or_add_when_they_repeat_a_call_is_harmless() -> None:
    call = {"id": "c1", "type": None, "index": 0, "function": {"name": "now", "arguments": None}}
    added = {"provider_specific_fields": {"x": 1}, "thinking_blocks": [{"type": "thinking"}]}
    parsed = chat({"role": "assistant", "content": None, "tool_calls": [call], **added})
    assert parsed.request.messages == (Message("assistant", "", (ToolCall("c1", "now", ""),)),)
    assert parsed.ignored == ("messages[].provider_specific_fields", "messages[].thinking_blocks")
    assert not chat({"role": "assistant", "content": "x", **dict.fromkeys(added)}).ignored


def test_the_words_of_an_error_are_in_the_style_of_the_others() -> None:
    found = refused(tools=[{"type": "function", "function": {"name": "a b"}}])
    assert found["tools[0].function.name"].startswith("should match pattern")


def test_a_result_without_its_call_and_a_call_without_its_result_pass() -> None:
    parsed = chat(
        {"role": "tool", "tool_call_id": "c9", "content": "warm"}, {"role": "assistant", "tool_calls": [CALL]}
    )
    assert [message.role for message in parsed.request.messages] == ["tool", "assistant"]
    assert chat({"role": "tool", "content": "warm"}).request.messages == (Message("tool", "warm"),)


@pytest.mark.parametrize(
    ("turn", "param", "message"),
    [
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls", "only messages of"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls", "should be a valid list"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}, "messages[0].tool_calls[0].id", "is req"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "messages[0].tool_calls[0].type",
         "should be 'function'"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "x", "arguments": 5}}]},
         "messages[0].tool_calls[0].function.arguments", "should be a valid string, got 5"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "x", "arguments": {"a": 1e400}}}]},
         "messages[0].tool_calls[0].function.arguments", "hold a number that is too large for JSON"),
        ({"role": "assistant", "content": "", "function_call": {"name": "x", "arguments": ""}},
         "messages[0].function_call", "send tool_choice (of a message: tool_calls)"),
        ({"role": "tool", "tool_call_id": 5, "content": ""}, "messages[0].tool_call_id", "should be a valid string"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[0].content", "is required"),
        ({"role": "user", "content": "x", "name": "\ud800"}, "messages[0].name", "holds no text"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio", "leave it out"),
    ],
)  # fmt: skip
def test_wrong_tool_messages_say_where_and_what(turn: dict[str, Any], param: str, message: str) -> None:
    found = refused(turn)
    assert list(found) == [param] and message in found[param]


def test_refusals_and_reasoning_of_earlier_answers_are_kept_under_each_name() -> None:
    parts = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "4"}]
    parsed = chat(
        {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"},
        {"role": "assistant", "content": "4", "reasoning": "2 + 2"},
        {"role": "assistant", "reasoning": "2 + 2"},
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "x", "reasoning": {"effort": 1}, "annotations": [{"type": "url_citation"}]},
    )
    assert parsed.request.messages == (
        Message("assistant", "4", reasoning="2 + 2"),
        Message("assistant", "4", reasoning="2 + 2"),
        Message("assistant", "", reasoning="2 + 2"),
        Message("assistant", "4", reasoning="hm"),
        Message("assistant", "No."),
        Message("assistant", "No."),
        Message("assistant", "x"),
    )
    assert parsed.ignored == ("messages[].annotations", "messages[].reasoning")


@pytest.mark.parametrize("url", [PNG, "https://example.org/a.png", "http://example.org/a.png"])
def test_images_go_to_experts_with_vision(url: str) -> None:
    parsed = chat(image({"url": url, "detail": "low"}), image(url))
    text = {"type": "text", "text": "see"}
    assert [message.parts for message in parsed.request.messages] == [
        (text, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}),
        (text, {"type": "image_url", "image_url": {"url": url}}),
    ]
    assert parsed.query.needs == {VISION} and parsed.query.text == "see"


@pytest.mark.parametrize(
    ("url", "param", "message"),
    [
        ({"url": "file:///etc/passwd"}, ".image_url.url", "should be an http(s) URL, or data:image/...;base64,..."),
        ({"url": "data:text/html;base64,AA"}, ".image_url.url", "should be an http(s) URL"),
        ({"url": "data:image/png,raw"}, ".image_url.url", "should be an http(s) URL"),
        ({"url": "https://e.org/" + "a" * bounds.MOST_URL}, ".image_url.url", "characters, at most 8,192 are read"),
        ({"url": PNG, "detail": "huge"}, ".image_url.detail", "should be 'auto', 'low' or 'high'"),
        ({"uri": PNG, "url": PNG}, ".image_url.uri", "did you mean 'url'"),
        (5, ".image_url", "should be an object, got 5"),
    ],
)
def test_wrong_images_say_where_and_what(url: object, param: str, message: str) -> None:
    found = refused(image(url))
    assert list(found) == ["messages[0].content[1]" + param] and message in found["messages[0].content[1]" + param]


def test_a_schema_for_the_answer_arrives_whole() -> None:
    document = {"name": "City_1-x", "description": "d", "schema": SCHEMA, "strict": True}
    parsed = chat(response_format={"type": "json_schema", "json_schema": document})
    assert parsed.request.json_schema == document and parsed.request.format == parsed.query.format == "json"
    assert parsed.query.needs == {JSON_SCHEMA}
    loose = chat(response_format={"type": "json_object"})
    assert loose.request.json_schema is None and loose.request.format == "json" and not loose.query.needs
    assert chat(response_format={"type": "json_object", "json_schema": None}) == loose


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"type": "json_schema"}, "", 'needs "json_schema": {"name": ..., "schema": {...}}'),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "", 'only goes with "type"'),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, ".json_schema.schema", "is required"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, ".json_schema.name", "is required"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, ".json_schema.name", "should match"),
        ({"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}}, ".json_schema.name", "should match"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}, ".json_schema.schema", "an object"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": 5}}}, ".json_schema.schema",
         "its properties should be an object"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strct": True}}, ".json_schema.strct",
         "did you mean 'strict'"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schemas": {}, "schema": {}}}, ".json_schema.schemas",
         "did you mean 'schema'"),
    ],
)  # fmt: skip
def test_wrong_schemas_say_where_and_what(given: dict[str, Any], param: str, message: str) -> None:
    found = refused(response_format=given)
    assert list(found) == ["response_format" + param] and message in found["response_format" + param]


def test_reasoning_and_template_variables_arrive() -> None:
    parsed = chat(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert parsed.request.reasoning_effort == "high"
    assert parsed.request.template_kwargs == {"enable_thinking": False}
    assert "should be 'none', 'minimal'" in refused(reasoning_effort="hihg")["reasoning_effort"]
    for name in ("messages", "tools", "add_generation_prompt"):
        assert refused(chat_template_kwargs={name: 1}) == {f"chat_template_kwargs.{name}": "is set by the request"}
    for name in ("a-b", "", "__x"):
        assert list(refused(chat_template_kwargs={name: 1}).values()) == ["is no name of a variable"]
    assert "should be an object" in refused(chat_template_kwargs=[1])["chat_template_kwargs"]


def test_log_probabilities_of_a_chat_answer() -> None:
    assert chat().request.logprobs is None and chat(logprobs=False, top_logprobs=0).request.logprobs is None
    assert chat(logprobs=True).request.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).request.logprobs == 20
    assert "less than or equal to 20, got 21" in refused(logprobs=True, top_logprobs=21)["top_logprobs"]
    assert refused(top_logprobs=2) == {"top_logprobs": 'only goes with "logprobs": true'}
    assert "should be a valid boolean" in refused(logprobs=1)["logprobs"]
