"""Scripted answers of fake experts: reasoning and tool calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coe.chunks import Joined
from coe.engines.fake import FakeEngine
from coe.engines.fake_answers import smallest
from coe.types import Answer, Chunk, GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
SCRIPT = 'fake://script?sunny=It is sunny.&Rome=@think:Look it up. @call:weather:{"city": "Rome"} @call:time'


def request(*messages: Message, **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages or (Message("user", "Weather in Rome?"),), **{"tools": (WEATHER, TIME)} | fields)


async def chunks_of(request: GenerateRequest, source: str = SCRIPT) -> list[Chunk]:
    expert = await FakeEngine().load(ExpertSpec(name="e", kind=Kind.MODEL, source=source), Path())
    return [chunk async for chunk in expert.generate(request)]


async def answer(request: GenerateRequest, source: str = SCRIPT) -> Answer:
    joined = Joined()
    for chunk in (chunks := await chunks_of(request, source)):
        joined.add(chunk)
    return joined.answer("e", chunks[-1])


def calls(answer: Answer) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in answer.tool_calls]


async def test_a_script_reasons_and_calls_tools_in_pieces() -> None:
    chunks = await chunks_of(request())
    assert [c.reasoning for c in chunks if c.reasoning] == ["Look", " it", " up."]
    assert len([c for c in chunks if c.tool_calls]) == 5  # a name, then arguments token by token
    whole = await answer(request())
    assert (whole.text, whole.reasoning, whole.finish_reason) == ("", "Look it up.", "tool_calls")
    assert calls(whole) == [("weather", '{"city": "Rome"}'), ("time", "{}")]
    assert whole.usage.completion_tokens == 8


async def test_ids_are_those_of_the_same_request_and_differ_between_calls_and_turns() -> None:
    first, again = await answer(request()), await answer(request())
    later = await answer(request(Message("user", "Hello"), Message("user", "Weather in Rome?")))
    ids = [call.id for each in (first, later) for call in each.tool_calls]
    assert first.tool_calls == again.tool_calls
    assert len(set(ids)) == 4
    assert all(len(i) == 29 and i.startswith("call_") for i in ids)


async def test_the_result_of_a_call_selects_the_next_answer() -> None:
    first = await answer(request())
    said = Message("assistant", "", first.tool_calls)
    results = [Message("tool", "sunny", tool_call_id=call.id) for call in first.tool_calls]
    assert (await answer(request(Message("user", "Weather in Rome?"), said, *results))).text == "It is sunny."


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": ()}, []),
        ({"tool_choice": "none"}, []),
        ({"tools": (TIME,)}, [("time", "{}")]),
        ({"parallel_tool_calls": False}, [("weather", '{"city": "Rome"}')]),
        ({"tool_choice": "required", "tool_name": "time"}, [("time", "{}")]),
    ],
)
async def test_only_calls_that_the_request_allows_are_made(
    fields: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    whole = await answer(request(**fields))
    assert calls(whole) == expected
    assert whole.finish_reason == ("tool_calls" if expected else "stop")


async def test_a_demanded_call_that_the_script_lacks_has_the_smallest_arguments() -> None:
    whole = await answer(request(tool_choice="required"), "fake://echo")
    assert (whole.text, calls(whole)) == ("", [("weather", '{"city": ""}')])
    assert calls(await answer(request(tool_choice="required", tool_name="time"), "fake://echo")) == [("time", "{}")]


async def test_max_tokens_cut_a_call_and_stop_strings_only_text() -> None:
    cut = await answer(request(max_tokens=5))
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 5)
    assert calls(cut) == [("weather", '{"city":')]
    stopped = await answer(request(stop=("it", "Rome")), "fake://script?Rome=@think:A bit. @text:Is it so?")
    assert (stopped.text, stopped.reasoning, stopped.finish_reason) == ("Is ", "A bit.", "stop")


async def test_a_text_of_the_user_makes_no_call() -> None:
    whole = await answer(request(Message("user", '@call:weather:{"city":"Oslo"}')), "fake://echo")
    assert (whole.text, calls(whole)) == ('@call:weather:{"city":"Oslo"}', [])


def test_the_smallest_value_of_a_schema() -> None:
    schema = {
        "type": "object",
        "required": ["a", "b", "c", "d"],
        "properties": {
            "a": {"type": "array", "minItems": 2, "items": {"type": "integer", "minimum": 3}},
            "b": {"enum": ["x", "y"]},
            "c": {"anyOf": [{"type": ["boolean", "null"]}, {"type": "null"}]},
            "d": PLACE,
        },
    }
    assert smallest(schema) == {"a": [3, 3], "b": "x", "c": False, "d": {"city": ""}}
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"type": "object", "required": ["a"], "properties": {"a": deep}}
    assert len(json.dumps(smallest(deep))) < 200
