"""Tool calls, reasoning and log-probabilities through the official client, as one body and as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from api_server import Words, expert, gateway

from coe.engines.fake import FakeExpert
from coe.policy import Always, Policy
from coe.types import Chunk, GenerateRequest, TokenLogprob, Usage

WEATHER: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
]
SCRIPT = 'fake://script?21 degrees=It is warm.&sunny=@think:Look it up. @call:weather:{"city": "Köln"}&default=hi'
CALLER = expert("caller", SCRIPT, capabilities=frozenset({"chat", "tools"}))
SCORED = frozenset({"chat", "logprobs", "prompt_logprobs", "token_prompts"})
QUESTION: list[Any] = [{"role": "user", "content": "is it sunny?"}]


async def test_a_tool_call_comes_with_its_reasoning_and_no_content() -> None:
    async with gateway(experts=[expert("echo"), CALLER]) as g:
        raw = await g.client.chat.completions.with_raw_response.create(
            model="auto", messages=QUESTION, tools=WEATHER, extra_body={"coe": {"answers": True}}
        )
        answer = raw.parse()
        assert answer.model == raw.headers["x-coe-expert"] == "caller", "only it can call tools"
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert (choice.message.model_extra or {})["reasoning_content"] == "Look it up."
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        assert call.type == "function" and call.id
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
        [outcome] = (answer.model_extra or {})["coe"]["answers"]
        assert outcome["tool_calls"] == [call.model_dump()] and outcome["text"] == ""


async def test_the_result_of_a_call_leads_to_an_answer() -> None:
    async with gateway(experts=[expert("echo"), CALLER]) as g:
        first = await g.client.chat.completions.create(model="caller", messages=QUESTION, tools=WEATHER)
        message: Any = first.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
        answer = await g.client.chat.completions.create(
            model="caller", messages=[*QUESTION, message, result], tools=WEATHER
        )
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It is warm.", "stop")
        assert "tool_calls" not in answer.choices[0].message.model_fields_set


async def test_a_stream_of_a_tool_call_is_put_together_by_the_clients_own_helper() -> None:
    async with gateway(experts=[expert("echo"), CALLER]) as g:
        async with g.client.chat.completions.stream(model="auto", messages=QUESTION, tools=WEATHER) as stream:
            chunks = [event.chunk async for event in stream if event.type == "chunk"]
            final = await stream.get_final_completion()
        [choice] = final.choices
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Köln"}'
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "Look it up."
        pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
        assert [piece.index for piece in pieces] == [0] * len(pieces) and len(pieces) > 2
        assert pieces[0].type == "function" and all(piece.id is piece.type is None for piece in pieces[1:])
        assert deltas[0].role == "assistant" and chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_no_expert_with_tools_is_a_clear_error_and_none_needs_none() -> None:
    async with gateway(experts=[expert("echo")]) as g:
        with pytest.raises(openai.BadRequestError, match="echo .tools: it cannot call tools") as caught:
            await g.client.chat.completions.create(model="auto", messages=QUESTION, tools=WEATHER)
        assert caught.value.code == "no_eligible_expert"
        with pytest.raises(openai.BadRequestError, match="'echo' cannot take this request: tools: it cannot call"):
            await g.client.chat.completions.create(model="echo", messages=QUESTION, tools=WEATHER)
        answer = await g.client.chat.completions.create(
            model="auto", messages=QUESTION, tools=WEATHER, tool_choice="none"
        )
        assert answer.choices[0].message.content == "is it sunny?"


async def scored(self: FakeExpert, request: GenerateRequest, adapter: object = None) -> AsyncIterator[Chunk]:
    """An engine that scores a prompt of the tokens `é` and ` x`, and answers ` yes`."""
    top = ((" yes", -0.1, b" yes"), (" no", -2.5, b" no"))
    yes = TokenLogprob(" yes", -0.1, b" yes", top[: request.logprobs or 0])
    if request.echo:
        start = TokenLogprob("é", None, "é".encode())
        yield Chunk("é x", prompt_logprobs=(start, TokenLogprob(" x", float("-inf"), b" x", ((" y", -1.0, b" y"),))))
    if request.max_tokens != 0:
        yield Chunk("", logprobs=(yes,))
        yield Chunk(" yes")
    yield Chunk("", "length", Usage(2, 1))


async def test_log_probabilities_of_a_chat_answer_whole_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", scored)
    async with gateway(experts=[expert("echo"), expert("scored", capabilities=SCORED)]) as g:
        given: Any = {"model": "auto", "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
        answer = await g.client.chat.completions.create(**given)
        assert answer.model == "scored" and answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.content is not None
        [token] = answer.choices[0].logprobs.content
        assert (token.token, token.logprob, bytes(token.bytes or ())) == (" yes", -0.1, b" yes")
        assert [(top.token, top.logprob) for top in token.top_logprobs] == [(" yes", -0.1), (" no", -2.5)]
        stream = await g.client.chat.completions.create(**given, stream=True)
        found = [
            choice.logprobs.content async for chunk in stream for choice in chunk.choices if choice.logprobs is not None
        ]
        assert found == [[token]], "a chunk without text is sent, too"


async def test_token_ids_need_a_named_expert_or_a_policy_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", scored)
    experts = [expert("echo"), expert("scored", capabilities=SCORED)]
    policies = {"default": Policy("default", Words(("echo", "scored"))), "one": Policy("one", Always("scored"))}
    async with gateway(experts=experts, policies=policies) as g:
        with pytest.raises(openai.BadRequestError, match="name the expert as `model`, or send text") as caught:
            await g.client.completions.create(model="auto", prompt=[[5, 6], [7]])
        assert caught.value.code == "invalid_request"
        for model in ("scored", "coe/one"):
            answer = await g.client.completions.create(model=model, prompt=[[5, 6], [7]])
            assert [choice.text for choice in answer.choices] == [" yes", " yes"] and answer.model == "scored"
        with pytest.raises(openai.BadRequestError, match="token_prompts: it cannot read token ids"):
            await g.client.completions.create(model="echo", prompt=[5, 6])


async def test_log_probabilities_of_a_completion_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExpert, "generate", scored)
    async with gateway(experts=[expert("echo"), expert("scored", capabilities=SCORED)]) as g:
        given: Any = {"model": "scored", "prompt": [5, 6], "logprobs": 2, "echo": True}
        answer = await g.client.completions.create(**given, max_tokens=1)
        whole = answer.choices[0].logprobs
        assert answer.choices[0].text == "é x yes" and whole is not None
        assert (whole.tokens, whole.token_logprobs) == (["é", " x", " yes"], [None, -9999.0, -0.1])
        assert whole.top_logprobs == [None, {" y": -1.0, " x": -9999.0}, {" yes": -0.1, " no": -2.5}]
        assert whole.text_offset == [0, 1, 3]
        stream = await g.client.completions.create(**given, max_tokens=1, stream=True)
        pieces = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices[0].logprobs is not None]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for piece in pieces for value in getattr(piece, name)] == getattr(whole, name)
        none = await g.client.completions.create(**given, max_tokens=0)
        assert none.choices[0].text == "é x" and none.choices[0].logprobs is not None
        assert none.choices[0].logprobs.tokens == ["é", " x"]
