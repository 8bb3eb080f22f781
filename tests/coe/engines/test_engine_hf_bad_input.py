"""Bad input to an hf expert over HTTP: an answer, or an error that states what is wrong and where; nothing stalls."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Gateway, expert, gateway
from engine_models import CHATML, model_spec

from coe.engines.hf.engine import HFEngine
from registry.describe import describe

TOOLS = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + CHATML + "{# <tool_call> #}"
ABLE = frozenset({"chat", "tools"})
SOON_S = 5.0
"""Within this an answer of another expert must come; a busy machine takes 0.1 s."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template for tools."""
    copy = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("able") / "model"))
    (copy / "chat_template.jinja").write_text(TOOLS)
    return copy


@pytest.fixture
async def served(folder: Path, engine: HFEngine) -> AsyncIterator[Gateway]:
    spec = describe(model_spec(folder, capabilities=ABLE))
    experts = [spec, expert("echo")]
    settings = {"max_in_flight": 66}
    engines = {"hf": engine}
    async with gateway(experts=experts, engines=engines, settings=settings, files=folder, budget_bytes=2**30) as g:
        yield g


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    turns = messages or (user("the capital"),)
    return {"model": "tiny", "messages": turns, "max_tokens": 8, **fields}


def text(prompt: object, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 2, **fields}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def schema(schema: object) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def demanded(parameters: object) -> dict[str, Any]:
    function = {"name": "get", "parameters": parameters}
    return chat(tools=[{"type": "function", "function": function}], tool_choice="required")


def called(arguments: str) -> dict[str, Any]:
    return assistant(tool_calls=[{"id": "c", "function": {"name": "get", "arguments": arguments}}])


def result(**fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "21 degrees", **fields}


LIST = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"], "additionalProperties": False}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
STRNIG = {"type": "object", "properties": {"a": {"type": "strnig"}}}
REFUSED = {
    "schema with an unknown type": (schema(STRNIG), "response_format", "(at /properties/a/type): Invalid type: strnig"),
    "schema with an unsupported keyword": (
        schema({"not": {}}),
        "response_format",
        "the keyword 'not' of its JSON schema is not",
    ),
    "schema of too much memory": (
        schema({"type": "array", "minItems": 10**9}),
        "response_format",
        "lower its counts (minItems,",
    ),
    "schema that refers to itself alone": (schema(LOOP), "response_format", "no answer can satisfy its JSON schema"),
    "schema of 1 MB": (
        schema({"description": "x" * 2**20}),
        "response_format.json_schema",
        "has 1,048,616 bytes, at most 262,144 are read",
    ),
    "schema that is no object": (schema("{}"), "response_format.json_schema.schema", "should be an object"),
    "parameters that are no object": (demanded("{}"), "tools[0].function.parameters", "should be an object"),
    "parameters of a string": (
        demanded({"type": "string"}),
        "tools[0].function.parameters",
        'of an object: {"type"',
    ),
    "parameters with an unknown type": (
        demanded(STRNIG),
        "tools",
        "of tool 'get' cannot be used (at /properties/a/type)",
    ),
    "parameters of 1 MB": (demanded({"description": "x" * 2**20}), "tools", "at most 1,048,576 are read"),
    "no messages": ({**chat(), "messages": []}, "messages", "must not be empty"),
    "500 turns": (
        chat(*[user("why?"), assistant(content="so")] * 250),
        None,
        "'tiny' has a context of 512 tokens: shorten the prompt or lower max_tokens",
    ),
    "200 answers": (chat(n=200), "n", "should be less than or equal to 128, got 200"),
    "200 answers to a text": (text("the", n=200), "n", "should be less than or equal to 128, got 200"),
    "more answers than places": (chat(n=128, temperature=1), None, "(serve.max_in_flight): lower n, or send fewer"),
    "log-probabilities of a chat": (
        chat(logprobs=True, top_logprobs=21),
        "top_logprobs",
        "or equal to 20, got 21",
    ),
    "log-probabilities of a text": (text("the", logprobs=6), "logprobs", "should be less than or equal to 5, got 6"),
    "token id beyond the vocabulary": (
        text([1, 999_999]),
        "prompt",
        "prompt has the token id 999999, but the vocabulary",
    ),
    "token id of one of several prompts": (text([[1], [999_999]]), "prompt[1]", "send ids from 0 to 289, made with"),
    "token id beyond any vocabulary": (text([2**31]), "prompt[0]", "a whole number from 0 to 2,147,483,647"),
    "bias of a token id beyond": (
        chat(logit_bias={"290": 1}),
        "logit_bias",
        "logit_bias has the token id 290, but the voc",
    ),
    "empty prompt": (text(""), None, "the prompt for 'tiny' is empty: it has no tokens; send at least one"),
    "empty prompt among others": (text(["the", ""]), "prompt[1]", "the prompt for 'tiny' is empty"),
}
ANSWERED = {
    "recursive schema": schema(LIST),
    "recursive parameters": demanded({"properties": {"a": {"$ref": "#"}}}),
    "schema of 13,000 values": schema({"enum": [f"value {i}" for i in range(13_000)]}),
    "broken parameters of a call that is not demanded": demanded(STRNIG) | {"tool_choice": "auto"},
    "a result without its call": chat(result(tool_call_id="c"), user("why?")),
    "a result without an id": chat(user("hi"), result()),
    "a call without its result": chat(user("hi"), called("{}"), user("why?")),
    "a call whose arguments are no JSON": chat(user("hi"), called("{"), result(tool_call_id="c")),
    "an assistant turn first": chat(assistant(content="Hello!"), user("hi")),
    "an assistant turn alone": chat(assistant(content="Hello!")),
    "500 turns to any expert": chat(*[user("why?"), assistant(content="so")] * 250, model="auto"),
    "empty turns": chat(user(""), assistant(content=""), user(" "), assistant(content=None), assistant(), user("hi")),
    "an empty last turn": chat(user("hi"), assistant(content="so"), user("")),
    "20 log-probabilities": chat(logprobs=True, top_logprobs=20),
    "the last token id": text([289]),
    "64 answers": chat(n=64, temperature=1, max_tokens=1),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_it_is_an_error_of_the_request_with_its_place(served: Gateway, stream: bool) -> None:
    for name, (body, param, message) in REFUSED.items():
        response = await _post(served, body, stream)
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param), name
        assert message in error["message"] and len(error["message"]) < 600, name


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_it_is_answered(served: Gateway, stream: bool) -> None:
    for name, body in ANSWERED.items():
        response = await _post(served, body, stream)
        assert response.status_code == 200, name
        if stream:
            *events, done, rest = response.text.split("\n\n")
            assert (done, rest) == ("data: [DONE]", ""), name
            ends = [json.loads(event.removeprefix("data: "))["choices"][0]["finish_reason"] for event in events]
        else:
            ends = [choice["finish_reason"] for choice in response.json()["choices"]]
        assert len([end for end in ends if end]) == body.get("n", 1), name


async def _post(served: Gateway, body: dict[str, Any], stream: bool) -> Any:
    """The response. Meanwhile another expert answers."""
    path = TEXT if "prompt" in body else CHAT
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(_ask_until(ended, served))
        response = await served.http.post(path, json=body | {"stream": stream}, timeout=60)
        ended.set()
    return response


async def _ask_until(ended: asyncio.Event, served: Gateway) -> None:
    while not ended.is_set():
        async with asyncio.timeout(SOON_S):
            assert (await served.http.post(CHAT, json=HELLO)).status_code == 200
        await asyncio.sleep(0.01)
