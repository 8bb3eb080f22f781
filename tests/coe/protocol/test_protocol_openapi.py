"""The OpenAPI document states what the API accepts and returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_schemas import schema_problems as problems

from coe.protocol.answers import ChatAnswer, TextAnswer, usage_chunk
from coe.protocol.openapi import openapi_document
from coe.protocol.requests import parse_chat, parse_completion
from coe.serve.http.docs_page import docs_page
from coe.types import Answer, Chunk, TokenLogprob, ToolCallDelta, Usage
from routers.base import ToolCall

HELLO = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}


def test_the_document_is_json_and_every_reference_leads_somewhere() -> None:
    text = json.dumps(openapi_document())
    schemas = openapi_document()["components"]["schemas"]
    for name in {piece.partition('"')[0] for piece in text.split("#/components/schemas/")[1:]}:
        Draft202012Validator.check_schema(schemas[name])


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest", "ResponseRequest"])
def test_every_field_has_a_meaning(name: str) -> None:
    properties = openapi_document()["components"]["schemas"][name]["properties"]
    assert [field for field, about in properties.items() if not about.get("description")] == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": "a"},
        {"stop": ["a", "b"], "temperature": 2, "top_p": 0.5, "seed": -1, "n": 2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "assistant", "content": None}, {"role": "user", "content": ""}]},
        {"messages": [{"role": "assistant"}, {"role": "user", "content": "hi", "tool_calls": []}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "c", "content": "4"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
        {"logprobs": True, "top_logprobs": 3, "logit_bias": {"7": -100}, "user": "me", "length_penalty": 1.0},
        {"coe": {"experts": ["a"], "cost_weight": 0.5}, "stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_what_is_accepted_satisfies_the_schema(fields: dict[str, Any]) -> None:
    assert problems("ChatRequest", HELLO | fields) == []
    parse_chat(HELLO | fields)


@pytest.mark.parametrize("prompt", ["hi", ["hi", "ho"], [1, 2], [[1], [2, 3]]])
def test_every_form_of_a_prompt_satisfies_the_schema(prompt: object) -> None:
    body = {"model": "auto", "prompt": prompt}
    assert problems("CompletionRequest", body) == []
    parse_completion(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"n": 0},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": "hi", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
        {"tool_choice": "always"},
        {"length_penalty": 2.0},
        {"unknown": 1},
        {"top_logprobs": 21},
    ],
)
def test_what_is_refused_does_not_satisfy_the_schema(fields: dict[str, Any]) -> None:
    assert problems("ChatRequest", HELLO | fields) != []
    with pytest.raises(Exception, match=next(iter(fields))):
        parse_chat(HELLO | fields)


def test_the_bodies_that_clients_send_satisfy_the_schemas() -> None:
    lines = (Path(__file__).parent / "client_bodies.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 10
    for line in lines:
        record = json.loads(line)
        body = record["body"]
        name = "CompletionRequest" if "prompt" in body else "ChatRequest"
        assert problems(name, body) == [], record


TOKENS = (TokenLogprob("Hi", -0.5, b"Hi", (("Hi", -0.5, b"Hi"),)), TokenLogprob("?", None))
USAGE = Usage(5, 7, estimated=True)
ANSWER = Answer(
    "e",
    "Hi",
    "tool_calls",
    USAGE,
    reasoning="Greet.",
    tool_calls=(ToolCall("c", "f", "{}"),),
    logprobs=TOKENS[:1],
)


def test_the_bodies_of_answers_satisfy_the_schemas() -> None:
    for shape, name in ((ChatAnswer("id", 1, "e"), "ChatCompletion"), (TextAnswer("id", 1, "e"), "Completion")):
        assert problems(name, shape.whole(ANSWER)) == []
        assert problems(name, shape.whole(Answer("e", "Hi", "stop", Usage(1, 1)))) == []


def test_the_chunks_of_streams_satisfy_the_schemas() -> None:
    pieces = (
        Chunk("Hi", logprobs=TOKENS),
        Chunk("", reasoning="Greet."),
        Chunk("", tool_calls=(ToolCallDelta(0, "c", "f"), ToolCallDelta(0, arguments="{}"))),
    )
    for shape, name in (
        (ChatAnswer("id", 1, "e", include_usage=True), "ChatCompletionChunk"),
        (TextAnswer("id", 1, "e", include_usage=True), "CompletionChunk"),
    ):
        chunks = [*shape.opening(), *(body for piece in pieces for body in shape.pieces(piece)), shape.ending("stop")]
        for chunk in [*chunks, usage_chunk(shape, USAGE)]:
            assert problems(name, chunk) == []


def test_the_page_names_every_path_field_and_schema_and_loads_nothing() -> None:
    page = docs_page().decode()
    assert "&lt; 2<sup>63</sup>" in page and "&ge; -2<sup>63</sup>" in page and "e+" not in page
    document = openapi_document()
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page
    for name, schema in document["components"]["schemas"].items():
        assert f"id={name}" in page
        for field in schema.get("properties", {}):
            assert f"<code>{field}" in page
    assert "<script" not in page
    assert "http://" not in page
