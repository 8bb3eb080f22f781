"""Tool calls, reasoning and log-probabilities in answers of endpoints, in the forms that servers send them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from raw_endpoint import DONE, Behaviour, answering, event, raw_endpoint

from coe.chunks import Joined
from coe.engines.remote.calls import MOST_CALLS
from coe.engines.remote.engine import RemoteEngine
from coe.engines.remote.limits import Limits
from coe.engines.remote.logprobs import LEAST
from coe.errors import RemoteError
from coe.types import Answer, Chunk, GenerateRequest, TokenLogprob
from routers.base import Message


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


TOOLS = GenerateRequest(
    messages=(Message("user", "Hello"),), max_tokens=20, tools=(tool("get"), tool("get_weather"), tool("now"))
)
PLAIN = replace(TOOLS, tools=())
END = event(None, "tool_calls")


async def chunks(behave: Behaviour, request: GenerateRequest = TOOLS) -> list[Chunk]:
    engine = RemoteEngine(retries=0, timeout_s=5.0)
    async with raw_endpoint(behave) as endpoint:
        expert = await engine.load(endpoint.spec(), Path())
        try:
            return [chunk async for chunk in expert.generate(request)]
        finally:
            await engine.unload(expert)


async def answer(body: str, request: GenerateRequest = TOOLS) -> Answer:
    joined, found = Joined(), await chunks(answering(body), request)
    for chunk in found:
        joined.add(chunk)
    return joined.answer("far", found[-1])


def piece(*calls: Any, **fields: Any) -> str:
    """A delta with pieces of tool calls."""
    choice = {"index": 0, "delta": {"tool_calls": list(calls), **fields}, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def part(index: int | None, call_id: Any = None, name: Any = None, arguments: Any = None) -> dict[str, Any]:
    """A piece of a call, without what is None."""
    function = {k: v for k, v in {"name": name, "arguments": arguments}.items() if v is not None}
    found = {"index": index, "id": call_id, "function": function or None}
    return {k: v for k, v in found.items() if v is not None}


def called(found: Answer) -> list[tuple[str, str]]:
    assert len({call.id for call in found.tool_calls}) == len(found.tool_calls)
    assert all(call.id for call in found.tool_calls)
    return [(call.name, call.arguments) for call in found.tool_calls]


ONE = [("get_weather", '{"city":"Rom"}')]
TWO = [*ONE, ("now", "{}")]
IN_PIECES = [
    pytest.param(
        piece(part(0, "a", "get_weather", ""))
        + piece(part(0, arguments='{"city"'))
        + piece(part(0, arguments=':"Rom"}')),
        ONE,
        id="as OpenAI does",
    ),
    pytest.param(
        piece(part(None, "a", "get_weather"))
        + piece(part(None, arguments='{"city":'))
        + piece(part(None, arguments='"Rom"}')),
        ONE,
        id="no index",
    ),
    pytest.param(
        piece(part(0, "a", "get_weather", '{"city"')) + piece(part(0, "a", "get_weather", ':"Rom"}')),
        ONE,
        id="id and name in each piece",
    ),
    pytest.param(
        piece(part(0, "a", "get_weather", '{"city"')) + piece(part(0, "b", arguments=':"Rom"}')),
        ONE,
        id="a fresh id in each piece",
    ),
    pytest.param(
        piece(part(0, "a", "get")) + piece(part(0, None, "_weather")) + piece(part(0, arguments='{"city":"Rom"}')),
        ONE,
        id="the name in pieces",
    ),
    pytest.param(
        piece({"index": 0, "id": "a", "function": {"name": "get_weather", "arguments": None}})
        + piece({"index": 0, "id": None, "function": {"name": None, "arguments": '{"city":"Rom"}'}}),
        ONE,
        id="null names",
    ),
    pytest.param(piece(part(0, "a", "get_weather", '{"city":"Rom"}')) * 2, ONE, id="the whole call again"),
    pytest.param(
        piece(part(0, "a", "get_weather", '{"city":"Rom"}')) + piece(part(0, name="get_weather", arguments="")),
        ONE,
        id="the name again",
    ),
    pytest.param(piece({"id": 7, "name": "get_weather", "arguments": '{"city":"Rom"}'}), ONE, id="no function"),
    pytest.param(
        piece(part(0, "a", "get_weather", '{"city":"Rom"}')) + piece(part(1, "b", "now", "{}")), TWO, id="two calls"
    ),
    pytest.param(
        piece(part(0, "a", "get_weather", '{"city":'), part(1, "b", "now", ""))
        + piece(part(1, arguments="{}"), part(0, arguments='"Rom"}')),
        TWO,
        id="two calls side by side",
    ),
    pytest.param(
        piece(part(0, "a", "get_weather", '{"city":"Rom"}')) + piece(part(0, "b", "now", "{}")),
        TWO,
        id="two calls with index 0",
    ),
    pytest.param(
        piece(part(None, "a", "get_weather", '{"city":"Rom"}'), part(None, "b", "now", "{}")),
        TWO,
        id="whole calls at once, no index",
    ),
    pytest.param(
        piece(part(None, None, "get_weather", '{"city":"Rom"}'), part(None, None, "now", "{}")),
        TWO,
        id="neither ids nor indices",
    ),
    pytest.param(
        piece(part(None, None, "now", "{}"), part(None, None, "now", "{}")),
        [("now", "{}"), ("now", "{}")],
        id="the same call twice",
    ),
    pytest.param(
        piece(part(0, "a", "now", "{}")) + piece(part(0, "b", "now", "{}")),
        [("now", "{}"), ("now", "{}")],
        id="the same call twice with index 0",
    ),
    pytest.param(
        piece(part(0, "a", "now")) + piece(part(1, "b", "get")), [("now", ""), ("get", "")], id="no arguments"
    ),
    pytest.param(
        'data: {"choices": [{"delta": {"function_call": {"name": "get_weather", "arguments": ""}}}]}\n\n'
        'data: {"choices": [{"delta": {"function_call": {"arguments": "{\\"city\\":\\"Rom\\"}"}}}]}\n\n',
        ONE,
        id="the old form",
    ),
]


@pytest.mark.parametrize("end", [END + DONE, event(None, "stop") + DONE, event(None, "eos"), DONE])
@pytest.mark.parametrize(("body", "expected"), IN_PIECES)
async def test_calls_in_the_forms_of_servers(body: str, expected: list[tuple[str, str]], end: str) -> None:
    found = await answer(body + end)
    assert called(found) == expected
    assert (found.text, found.finish_reason) == ("", "tool_calls")


async def test_arguments_as_an_object_are_text() -> None:
    found = await answer(piece(part(0, "a", "get_weather", {"city": "Rom", "near": ["ö"]})) + END)
    assert called(found) == [("get_weather", '{"city": "Rom", "near": ["ö"]}')]


async def test_a_whole_message_with_calls_and_text() -> None:
    message = {"role": "assistant", "content": "I look.", "tool_calls": [part(None, "a", "now", "{}")]}
    found = await answer(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert (found.text, called(found), found.finish_reason) == ("I look.", [("now", "{}")], "tool_calls")
    assert found.tool_calls[0].id == "a"


async def test_a_call_is_passed_on_as_it_comes() -> None:
    body = piece(part(0, "a", "now", "")) + piece(part(0, arguments="{")) + piece(part(0, arguments="}")) + END + DONE
    pieces = [chunk.tool_calls for chunk in await chunks(answering(body)) if chunk.tool_calls]
    assert [(p.index, p.id, p.name, p.arguments) for ps in pieces for p in ps] == [
        (0, "a", "now", ""),
        (0, "", "", "{"),
        (0, "", "", "}"),
    ]
    assert len(pieces) == 2


async def test_arguments_cut_by_max_tokens_are_an_answer_that_is_full() -> None:
    found = await answer(piece(part(0, "a", "now", '{"a')) + event(None, "length") + DONE)
    assert (called(found), found.finish_reason) == ([("now", '{"a')], "length")


async def test_halves_of_a_character_in_arguments_are_joined() -> None:
    halves = piece(part(0, "a", "now", '{"a":"\ud83d')) + piece(part(0, arguments='\ude00"}'))
    assert called(await answer(halves + END)) == [("now", '{"a":"😀"}')]
    lone = piece(part(0, "a", "now", "\ud83d")) + END
    assert called(await answer(lone)) == [("now", "\ufffd")]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (piece(part(0, "a", "rm", "{}")) + END, "calls the tool 'rm', which the request does not offer"),
        (piece(part(0, "a", "get_wea")) + END, "calls the tool 'get_wea'"),
        (piece(part(0, "a", None, "{}")) + END, "a tool call has no name"),
        (piece(part(0, "a", 1.5, "{}")) + END, "the id or the name of a tool call is none"),
        (piece(part(0, "x" * 300, "now", "{}")) + END, "the id or the name of a tool call is none"),
        (piece("now") + END, "a tool call is a str"),
        (piece(*[part(i, f"c{i}", "now", "{}") for i in range(MOST_CALLS + 1)]) + END, "more than 128 tool calls"),
        ('data: {"choices": [{"delta": {"tool_calls": {"0": 1}}}]}\n\n', "`tool_calls` is not a list but a dict"),
        (END + DONE, "ended with finish_reason 'tool_calls', and has no tool call"),
        (piece(part(0, "a", "now", "{}")) + event(None, "content_filter"), "ended with finish_reason 'content_filter'"),
        (piece(part(0, "a", "now", "{}")), "closed the stream before its end"),
    ],
)
async def test_what_is_no_call_is_an_error_of_the_endpoint(body: str, match: str) -> None:
    with pytest.raises(RemoteError, match=match):
        await answer(body)


async def test_as_many_calls_as_allowed_are_read() -> None:
    found = await answer(piece(*[part(i, f"c{i}", "now", "{}") for i in range(MOST_CALLS)]) + END)
    assert len(called(found)) == MOST_CALLS


@pytest.mark.parametrize("more", [0, 1])
async def test_arguments_are_cut_at_the_limit_of_characters(more: int) -> None:
    most = Limits.of_request(TOOLS, silence_s=1).characters
    sent = "x" * (most - 10)
    found = await answer(piece(part(0, "a", "now", sent)) + piece(part(0, arguments="y" * (10 + more))) + END)
    assert called(found) == [("now", sent + "y" * 10)]
    assert found.finish_reason == ("length" if more else "tool_calls")


@pytest.mark.parametrize(
    "body", [piece(part(0, "a", "now", "{}")) + END, piece(part(0, "a", "now")) + event(None, "stop")]
)
async def test_calls_without_offered_tools_are_no_answer(body: str) -> None:
    for request in (PLAIN, replace(TOOLS, tool_choice="none")):
        with pytest.raises(RemoteError, match="it has no text and calls a tool, though the request has no tools"):
            await answer(body, request)
        found = await answer(event("Hi") + body, request)
        assert (found.text, found.tool_calls, found.finish_reason) == ("Hi", (), "stop")


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "Hm, "},
        {"reasoning": "Hm, ", "reasoning_details": [{"type": "reasoning.text", "text": "Hm, "}]},
        {"reasoning_content": "Hm, ", "reasoning": "Hm, "},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm, "}]}]},
    ],
)
async def test_reasoning_is_passed_on_before_the_text(delta: dict[str, Any]) -> None:
    thought = f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"
    found = await chunks(answering(thought + thought + event("Hi", "stop") + DONE), PLAIN)
    assert [(chunk.reasoning, chunk.text) for chunk in found] == [("Hm, ", ""), ("Hm, ", ""), ("", "Hi"), ("", "")]


async def test_reasoning_and_a_call_are_a_whole_answer() -> None:
    thought = f"data: {json.dumps({'choices': [{'delta': {'reasoning_content': 'Hm'}}]})}\n\n"
    found = await answer(thought + piece(part(0, "a", "now", "{}")) + END)
    assert (found.reasoning, called(found), found.text) == ("Hm", [("now", "{}")], "")


# Log-probabilities


def scored(logprobs: Any, text: str = "Hi", **fields: Any) -> str:
    choice = {"delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice], **fields})}\n\n"


async def test_log_probabilities_of_chat() -> None:
    top = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}, {"token": "Yo", "logprob": -2, "bytes": None}]
    entry = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": top}
    body = scored({"content": [entry]}) + scored(None, " you") + scored({"content": None}, "!") + event(None, "stop")
    found = await answer(body + DONE, replace(PLAIN, logprobs=2))
    assert found.logprobs == (TokenLogprob("Hi", -0.5, b"Hi", (("Hi", -0.5, b"Hi"), ("Yo", -2.0, None))),)
    assert found.text == "Hi you!"
    assert (await answer(body, PLAIN)).logprobs == ()


async def test_numbers_and_tokens_that_are_none() -> None:
    entries = (
        '{"content": [{"token": "a", "logprob": null}, {"token": "b", "logprob": -Infinity}, {"token": "c",'
        '"logprob": NaN, "bytes": [300], "top_logprobs": [7, {"token": null}, {"token": "x", "logprob": 0.1}]},'
        '{"token": "\\ud83d", "logprob": -1e999}, {"logprob": -1}, {"token": "d", "logprob": 1' + "0" * 400 + "}, 5]}"
    )
    body = 'data: {"choices": [{"delta": {"content": "Hi"}, "logprobs": ' + entries + "}]}\n\n" + event(None, "stop")
    found = await answer(body, replace(PLAIN, logprobs=1))
    assert [(each.token, each.logprob) for each in found.logprobs] == [(t, LEAST) for t in ("a", "b", "c", "?", "d")]
    assert found.logprobs[2] == TokenLogprob("c", LEAST, None, (("x", 0.0, None),))


async def test_entries_beyond_what_max_tokens_can_need_are_left_out() -> None:
    request = replace(PLAIN, logprobs=0)
    body = scored({"content": [{"token": "x", "logprob": -1}] * 500}) + event(None, "stop")
    assert len((await answer(body, request)).logprobs) == Limits.of_request(request, silence_s=1).entries == 84


COMPLETION = GenerateRequest(prompt="Once upon", max_tokens=2, logprobs=1)


def completion(text: str, tokens: list[str], values: Any, tops: Any = None, **fields: Any) -> str:
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": [0] * len(tokens)}
    choice = {"text": text, "logprobs": logprobs, "finish_reason": fields.pop("reason", None)}
    return f"data: {json.dumps({'choices': [choice], **fields})}\n\n"


async def test_log_probabilities_of_completions() -> None:
    tops = [{" b": -0.2, " a": -0.1}, None]
    found = await answer(completion(" a time", [" a", " time"], [-0.1, -0.3], tops, reason="stop"), COMPLETION)
    assert found.logprobs == (
        TokenLogprob(" a", -0.1, None, ((" a", -0.1, None), (" b", -0.2, None))),
        TokenLogprob(" time", -0.3),
    )


ECHO = replace(COMPLETION, echo=True, prompt_logprobs=1)
ECHOED = completion("Once upon", ["Once", " upon"], [None, -2.0]) + completion(" a", [" a"], [-0.1], reason="length")


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("request_", [ECHO, replace(ECHO, prompt="", prompt_ids=(1, 2))])
async def test_an_echoed_prompt_has_its_own_log_probabilities(usage: bool, request_: GenerateRequest) -> None:
    end = 'data: {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}\n\n' if usage else ""
    first, last = await chunks(answering(ECHOED + end + DONE), request_)
    assert first.text == "Once upon a"
    assert first.prompt_logprobs == (TokenLogprob("Once", None), TokenLogprob(" upon", -2.0))
    assert first.logprobs == (TokenLogprob(" a", -0.1),)
    assert last.finish_reason == "length" and last.usage is not None
    assert last.usage.estimated is not usage and last.usage.completion_tokens == (1 if usage else 2)


async def test_a_prompt_alone_is_scored() -> None:
    body = completion("Once upon", ["Once", " upon"], [None, -2.0], reason="length")
    found = await answer(body + DONE, replace(ECHO, max_tokens=0))
    assert (found.text, found.finish_reason, found.logprobs) == ("Once upon", "length", ())
    assert found.prompt_logprobs == (TokenLogprob("Once", None), TokenLogprob(" upon", -2.0))
    assert found.usage.completion_tokens == 0


@pytest.mark.parametrize("body", [event(" a", "stop"), completion(" a", [" a"], [-0.1], reason="stop")])
async def test_an_endpoint_that_ignores_echo_fails_where_the_prompt_must_be_scored(body: str) -> None:
    with pytest.raises(RemoteError, match="it has no log-probabilities of the prompt"):
        await answer(body + DONE, ECHO)


async def test_log_probabilities_of_a_prompt_in_vllms_form() -> None:
    entries = [None, {"5": {"logprob": -2.0, "rank": 3, "decoded_token": "lo"}, "9": {"logprob": -0.5, "rank": 1}}]
    whole = {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], "prompt_logprobs": entries}
    found = await answer(json.dumps(whole), replace(PLAIN, prompt_logprobs=1))
    assert found.prompt_logprobs == (
        TokenLogprob("", None),
        TokenLogprob("lo", -2.0, None, (("", -0.5, None), ("lo", -2.0, None))),
    )
    assert found.logprobs == ()
