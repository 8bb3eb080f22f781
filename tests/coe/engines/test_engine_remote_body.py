"""What an endpoint gets of a request: every field that has an effect, under its name, and nothing neutral."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from raw_endpoint import DONE, answering, event, raw_endpoint

from coe.engines.remote.body import arguments
from coe.engines.remote.engine import RemoteEngine
from coe.errors import Rejected, Scope
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message, Query, ToolCall
from routers.constraints import check

HELLO = GenerateRequest(messages=(Message("user", "Hello"),), max_tokens=9)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
PLAIN = {"model", "messages", "max_tokens", "temperature", "top_p", "stream", "stream_options"}


async def sent(request: GenerateRequest, **spec: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body that the endpoint receives."""
    engine = RemoteEngine(retries=0)
    async with raw_endpoint(answering(event("Hi", "stop") + DONE)) as endpoint:
        expert = await engine.load(endpoint.spec(**spec), Path())
        try:
            async for _ in expert.generate(request):
                pass
        finally:
            await engine.unload(expert)
        head, body = endpoint.requests[0]
        return head.split()[1], body


async def test_a_plain_request_has_no_field_that_it_does_not_need() -> None:
    path, body = await sent(HELLO)
    assert (path, body.keys()) == ("/v1/chat/completions", PLAIN)
    path, body = await sent(GenerateRequest(prompt="Once", max_tokens=9))
    assert (path, body.keys()) == ("/v1/completions", PLAIN - {"messages"} | {"prompt"})


async def test_tools_and_how_they_may_be_called() -> None:
    _, body = await sent(replace(HELLO, tools=(TOOL,)))
    assert body["tools"] == [TOOL] and not {"tool_choice", "parallel_tool_calls"} & body.keys()
    _, body = await sent(replace(HELLO, tools=(TOOL,), tool_choice="required", parallel_tool_calls=False))
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    _, body = await sent(replace(HELLO, tools=(TOOL,), tool_choice="required", tool_name="now"))
    assert body["tool_choice"] == {"type": "function", "function": {"name": "now"}}


async def test_forbidden_tools_go_only_to_experts_that_know_tools() -> None:
    request = replace(HELLO, tools=(TOOL,), tool_choice="none", parallel_tool_calls=False)
    assert (await sent(request))[1].keys() == PLAIN
    _, body = await sent(request, capabilities=("chat", "tools"))
    assert (body["tools"], body["tool_choice"]) == ([TOOL], "none") and "parallel_tool_calls" not in body


async def test_messages_keep_calls_results_names_images_and_reasoning() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    text = {"type": "text", "text": "What is it?"}
    messages = (
        Message("user", "What is it?", name="ada", parts=(text, image)),
        Message("assistant", "", tool_calls=(ToolCall("c1", "now", "{}"),), reasoning="Hm"),
        Message("tool", "12:00", tool_call_id="c1"),
    )
    _, body = await sent(replace(HELLO, messages=messages))
    assert body["messages"] == [
        {"role": "user", "content": [text, image], "name": "ada"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
            "reasoning_content": "Hm",
        },
        {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
    ]


def test_openais_own_endpoint_gets_no_field_that_it_does_not_know() -> None:
    spec = ExpertSpec(name="gpt", kind=Kind.REMOTE, source="https://api.openai.com/v1")
    messages = (*HELLO.messages, Message("assistant", "Hi", reasoning="Hm"))
    given = arguments(spec, replace(HELLO, messages=messages))
    assert given["messages"][1] == {"role": "assistant", "content": "Hi"}
    assert given["max_completion_tokens"] == 9 and "max_tokens" not in given


async def test_json_objects_and_schemas() -> None:
    schema = {"name": "person", "strict": True, "schema": {"type": "object"}}
    _, body = await sent(replace(HELLO, format="json", json_schema=schema))
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}
    _, body = await sent(replace(HELLO, format="json", json_schema={"schema": {"type": "object"}}))
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": {"type": "object"}}
    _, body = await sent(GenerateRequest(prompt="Once", format="json"))
    assert body["response_format"] == {"type": "json_object"}


async def test_every_option_of_sampling_is_passed_unless_it_is_neutral() -> None:
    options = SamplingOptions(
        top_k=5,
        min_p=0.1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={7: 1.5},
        min_tokens=3,
        ignore_eos=True,
    )
    expected = {each.name: getattr(options, each.name) for each in fields(options)} | {"logit_bias": {"7": 1.5}}
    for request in (HELLO, GenerateRequest(prompt="Once")):
        _, body = await sent(replace(request, sampling=options))
        assert {name: body.get(name) for name in expected} == expected
        assert not expected.keys() & (await sent(request))[1].keys()


async def test_reasoning_effort_and_variables_of_the_template() -> None:
    _, body = await sent(replace(HELLO, reasoning_effort="low", template_kwargs={"enable_thinking": False}))
    assert (body["reasoning_effort"], body["chat_template_kwargs"]) == ("low", {"enable_thinking": False})


async def test_log_probabilities_in_the_words_of_each_endpoint() -> None:
    _, body = await sent(replace(HELLO, logprobs=0))
    assert body["logprobs"] is True and "top_logprobs" not in body
    _, body = await sent(replace(HELLO, logprobs=3))
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    _, body = await sent(GenerateRequest(prompt="Once", logprobs=0))
    assert body["logprobs"] == 0 and "echo" not in body


async def test_echo_and_token_ids() -> None:
    request = GenerateRequest(prompt="", prompt_ids=(5, 6, 7), echo=True, max_tokens=0)
    _, body = await sent(request)
    assert (body["prompt"], body["echo"], body["max_tokens"]) == ([5, 6, 7], True, 0)
    assert "echo" not in (await sent(replace(HELLO, echo=True)))[1]


def test_log_probabilities_of_a_prompt_without_echo_come_in_one_object() -> None:
    spec = ExpertSpec(name="far", kind=Kind.REMOTE, source="http://127.0.0.1:9/v1")
    given = arguments(spec, replace(HELLO, prompt_logprobs=2))
    assert given["extra_body"] == {"prompt_logprobs": 2} and given["stream"] is False
    assert "stream_options" not in given


async def test_an_endpoint_that_rejects_a_field_is_an_expert_that_cannot_answer() -> None:
    head = "HTTP/1.1 400 Bad\r\ncontent-type: application/json"
    engine = RemoteEngine(retries=0)
    async with raw_endpoint(answering('{"error": {"message": "logprobs is not supported"}}', head)) as endpoint:
        expert = await engine.load(endpoint.spec(), Path())
        with pytest.raises(Rejected, match="logprobs is not supported") as caught:
            await anext(expert.generate(replace(HELLO, logprobs=1)))
        await engine.unload(expert)
    assert caught.value.scope is Scope.EXPERT


@pytest.mark.parametrize(
    ("needs", "stated"),
    [
        ({"tools"}, "tools"),
        ({"vision"}, "vision"),
        ({"json_schema"}, "json_schema"),
        ({"logprobs"}, "logprobs"),
        ({"prompt_logprobs"}, "prompt_logprobs"),
        ({"token_prompts"}, "token_prompts"),
        ({"sampling"}, "sampling"),
    ],
)
def test_a_remote_expert_is_eligible_for_what_it_states(needs: set[str], stated: str) -> None:
    source = "http://127.0.0.1:9/v1"
    able = ExpertSpec(name="able", kind=Kind.REMOTE, source=source, capabilities=("chat", stated))
    plain = ExpertSpec(name="plain", kind=Kind.REMOTE, source=source, capabilities=("chat",))
    names = RemoteEngine.capabilities.names
    query = Query.of("Hello", needs=frozenset(needs))
    eligible = check(query, {"able": able, "plain": plain}, engines={"able": names, "plain": names})
    assert eligible.experts == {"able"}
