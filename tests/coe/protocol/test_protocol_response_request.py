"""Requests of `/v1/responses`: what they become, what is refused, and errors in their own terms."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import response_create_params as params
from openapi_schemas import schema_problems

from coe.errors import InvalidRequest
from coe.protocol import response_fields
from coe.protocol.errors import InvalidFields
from coe.protocol.requests import parse_chat
from coe.protocol.response_request import ParsedResponse, parse_response
from routers.base import Message, ToolCall

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
IMAGE = "data:image/png;base64,AAAA"


def parsed(given: object = "hi", **more: Any) -> ParsedResponse:
    body = {"model": "auto", "input": given, **more}
    assert schema_problems("ResponseRequest", body) == [], "what is accepted satisfies the OpenAPI document"
    return parse_response(body)


def messages(*items: Any, **more: Any) -> list[Message]:
    return list(parsed(list(items), **more).request.messages)


def problems(given: object = "hi", **more: Any) -> dict[str, str]:
    body = {"model": "auto", "input": given, **more}
    with pytest.raises(InvalidFields) as caught:
        parse_response(body)
    return {problem.param: problem.message for problem in caught.value.problems}


def call(call_id: str, name: str = "f", arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def result(call_id: str, output: object = "4") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def said(text: str, **more: Any) -> dict[str, Any]:
    """A message as a response has it."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part], **more}


def test_every_parameter_of_the_client_is_used_refused_or_ignored_by_name() -> None:
    documented = {
        *params.ResponseCreateParamsBase.__annotations__,
        *params.ResponseCreateParamsNonStreaming.__annotations__,
    }
    used = response_fields.ResponseFields.model_fields
    assert documented <= {*used, *response_fields.REFUSED, *response_fields.IGNORED}


def test_a_request_is_that_of_the_same_chat() -> None:
    own = {"experts": ["a", "b"], "exclude": ["b"], "cost_weight": 2.0, "deadline_s": 3, "seed": 1}
    shared: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x"], "top_k": 4, "coe": own}
    response = parse_response(
        {
            "model": "coe/frugal",
            "instructions": "Be brief.",
            "input": [{"role": "user", "content": "hi"}],
            "max_output_tokens": 9,
            "stream": True,
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
            "tool_choice": {"type": "function", "name": "f"},
            "parallel_tool_calls": False,
            "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}},
            "reasoning": {"effort": "low"},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            **shared,
        }
    )
    chat = parse_chat(
        {
            "model": "coe/frugal",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            "max_completion_tokens": 9,
            "stream": True,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": False,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
            "reasoning_effort": "low",
            "logprobs": True,
            "top_logprobs": 2,
            **shared,
        }
    )
    assert (response.model, response.request, response.query) == (chat.model, chat.request, chat.query)
    assert (response.stream, response.exclude, response.ignored) == (True, chat.exclude, ())
    assert response.echo["tools"][0] == {
        "type": "function", "name": "f", "description": None, "parameters": SCHEMA, "strict": True
    }  # fmt: skip
    assert response.echo["text"] == {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}}
    assert response.echo["tool_choice"] == {"type": "function", "name": "f"}
    assert (response.echo["temperature"], response.echo["max_output_tokens"]) == (0.5, 9)


def test_a_text_is_a_message_of_the_user_and_instructions_come_first() -> None:
    assert parsed("hi").request.messages == (Message("user", "hi"),)
    found = messages({"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}, instructions="X")
    assert found == [Message("system", "X"), Message("system", "Be brief."), Message("user", "hi")]


def test_parts_with_text_images_and_refusals() -> None:
    text, image = {"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": IMAGE, "detail": "original"}
    [message] = messages({"role": "user", "content": [text, image, {**text, "text": "b"}]})
    assert message.content == "ab" and [part["type"] for part in message.parts] == ["text", "image_url", "text"]
    assert message.parts[1]["image_url"] == {"url": IMAGE, "detail": "high"}
    assert messages({"role": "user", "content": [text]}) == [Message("user", "a")]
    assert messages({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}) == [
        Message("assistant", "No.")
    ]
    assert "vision" in parsed([{"role": "user", "content": [image]}]).query.needs
    [*_, shown] = messages(call("c"), result("c", [text, image]))
    assert (shown.role, shown.content, len(shown.parts)) == ("tool", "a", 2)


def test_reasoning_text_and_calls_that_follow_each_other_are_one_message() -> None:
    calls = (ToolCall("c", "f", "{}"), ToolCall("d", "f", "{}"))
    found = messages(
        {"role": "user", "content": "q"},
        reasoning("Hm."),
        said("Let me see."),
        call("c", id="fc_1", status="completed"),
        call("d"),
        result("c"),
        result("d", "5"),
        call("e"),
        result("e"),
        reasoning("So."),
        said("9"),
        said("Is that all?"),
    )
    assert found == [
        Message("user", "q"),
        Message("assistant", "Let me see.", calls, reasoning="Hm."),
        Message("tool", "4", tool_call_id="c"),
        Message("tool", "5", tool_call_id="d"),
        Message("assistant", "", (ToolCall("e", "f", "{}"),)),
        Message("tool", "4", tool_call_id="e"),
        Message("assistant", "9", reasoning="So."),
        Message("assistant", "Is that all?"),
    ]
    assert messages(call("c"), said("One moment."), result("c"))[0] == Message("assistant", "One moment.", calls[:1])
    cut = messages({"role": "user", "content": "q"}, reasoning("Hm"), {"role": "user", "content": "go on"})
    assert cut[1] == Message("assistant", "", reasoning="Hm"), "an answer that was cut while it reasoned"


def test_fields_without_effect_are_named_unless_they_request_what_happens_anyway() -> None:
    neutral: dict[str, Any] = {"store": False, "truncation": "disabled", "background": False, "text": {}}
    neutral |= {
        "reasoning": {},
        "include": [],
        "previous_response_id": None,
        "conversation": None,
        "service_tier": None,
    }
    assert parsed(**neutral, stream=True, stream_options={"include_obfuscation": False}).ignored == ()
    given: dict[str, Any] = {"store": True, "truncation": "auto", "user": "u", "text": {"verbosity": "low"}}
    given |= {"reasoning": {"summary": "auto", "mode": "standard"}, "include": ["reasoning.encrypted_content"]}
    encrypted = {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}
    assert parsed([encrypted, {"role": "user", "content": "hi"}], **given).ignored == (
        *("include", "input[].encrypted_content", "reasoning.summary", "store", "text.verbosity", "truncation", "user"),
    )


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"previous_response_id": "r"}, "previous_response_id", "earlier turns in input: nothing is stored here"),
        ({"conversation": {"id": "c"}}, "conversation", "nothing is stored here"),
        ({"background": True}, "background", "true is not supported here, only false"),
        ({"messages": []}, "messages", "send input"),
        ({"max_tokens": 5}, "max_tokens", "send max_output_tokens"),
        ({"response_format": {"type": "text"}}, "response_format", "send text.format"),
        ({"max_output_token": 5}, "max_output_token", "did you mean 'max_output_tokens'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens", "exceeds max_output_tokens, which is 5"),
        ({"tools": [{"type": "file_search"}]}, "tools[0]", "only tools of type 'function'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "is required"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools[1].name", "is the name of tools[0], too"),
        (
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice.name",
            "'g' is the name of no tool",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice", "send only these tools"),
        ({"tool_choice": "always"}, "tool_choice", '{"type": "function", "name": ...}'),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format", 'needs a "name" and a "schema"'),
        ({"text": {"format": {"type": "text", "name": "s"}}}, "text.format", "name only goes with"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schemas": {}, "schema": {}}}}, "text.format.schemas",
         "did you mean 'schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"x": "y" * 2**18}}}}, "text.format",
         "bytes, at most"),
        ({"metadata": {"a": 1}}, "metadata", "values that are texts"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "has 17 entries, at most 16"),
        ({"include": ["everything"]}, "include[0]", "should be 'message.output_text.logprobs'"),
        ({"include": ["x"] * 200}, "include", "has 200 values"),
        ({"stream_options": {}}, "stream_options", 'only goes with "stream": true'),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools", "is set by the request"),
        ({"coe": {"expert": ["a"]}}, "coe.expert", "did you mean 'experts'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_an_error_with_its_own_name(given: dict[str, Any], param: str, message: str) -> None:
    found = problems(**given)
    assert message in found[param], found
    assert schema_problems("ResponseRequest", {"model": "auto", "input": "hi", **given}) != [] or param in (
        *("tools[1].name", "tool_choice.name", "tool_choice", "text.format", "min_tokens", "stream_options"),
        *("include", "chat_template_kwargs.tools", "text.format"),
    ), "what the document refuses, too"


@pytest.mark.parametrize(
    ("item", "place", "message"),
    [
        ({"type": "item_reference", "id": "m"}, "", "send the item itself"),
        ({"id": "m"}, "", "send the item itself"),
        ({"type": "web_search_call", "id": "w"}, "", "only message, function_call, function_call_output, reasoning"),
        ("hi", "", "should be an object"),
        ({"content": "hi"}, ".role", "is required"),
        ({"role": "tool", "content": "hi"}, ".role", "should be"),
        ({"role": "user"}, ".content", "is required"),
        ({"role": "user", "content": None}, ".content", "should be a string or an array of parts"),
        ({"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}, ".content[0]", "input_file"),
        ({"role": "user", "content": [{"type": "text", "text": "hi"}]}, ".content[0]", "only input_text"),
        ({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}, ".content[0].image_url", "required"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, ".content[0].image_url", "URL"),
        (
            {"role": "user", "content": [{"type": "input_text", "texts": ""}]},
            ".content[0].texts",
            "did you mean 'text'",
        ),
        ({"role": "user", "content": "\ud800"}, ".content", "is not text"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, ".call_id", "is required"),
        ({**call("c"), "arguments": {}}, ".arguments", "should be a valid string"),
        ({**call("c"), "namespace": "n"}, ".namespace", "None"),
        (result("c", 4), ".output", "should be a string or an array of parts"),
        ({"role": "user", "content": "hi", **{str(i): 1 for i in range(200)}}, "", "has 202 fields"),
    ],
)
def test_a_wrong_item_is_named_by_its_place(item: Any, place: str, message: str) -> None:
    ok = {"role": "user", "content": "hi"}
    found = problems([ok, item, {"role": "robot", "content": ""}])
    assert message in found[f"input[1]{place}"], found
    assert "input[2].role" in found, "every problem at once"


def test_an_input_is_bounded() -> None:
    assert problems([]) == {"input": "must not be empty"}
    assert problems(3)["input"].startswith("should be a string or an array of items")
    assert problems(None)["input"].startswith("should be a string or an array of items")
    assert "has 8,193 items, at most 8,192" in problems([{"role": "user", "content": ""}] * 8193)["input"]
    assert "has 4,097 messages" in problems([{"role": "user", "content": ""}] * 4097)["input"]
    images = [{"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}] * 129}]
    assert "129 images" in problems(images)["input"]
    assert problems([{"type": "reasoning", "id": "r", "summary": []}]) == {"input": "must not be empty"}
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse_response([])
