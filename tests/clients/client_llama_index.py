"""llama-index: `OpenAILike` for chat and completions, tools, typed answers, and an agent."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from feature import CAPITAL, LONG, PERSON, PIXEL, REPORT, TWO_CITIES, WEATHER, Endpoint, feature, main, raises
from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: {REPORT}"


TOOL = FunctionTool.from_defaults(get_weather)


def _model(at: Endpoint, **options: Any) -> OpenAILike:
    settings = {
        "temperature": 0,
        "max_tokens": 80,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "max_retries": 0,
    }
    return OpenAILike(model=at.expert, api_base=at.url, api_key="none", context_window=4096, **settings | options)


def _user(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


@feature("chat")
def chat(at: Endpoint) -> None:
    answer = _model(at).chat([ChatMessage(role="system", content="Be brief."), *_user(CAPITAL)])
    assert answer.message.content == "The capital of France is Paris."


@feature("stream")
def stream(at: Endpoint) -> None:
    pieces = [piece.delta for piece in _model(at).stream_chat(_user(CAPITAL))]
    assert "".join(filter(None, pieces)) == "The capital of France is Paris." and len(pieces) > 2


@feature("history")
def history(at: Endpoint) -> None:
    first = _model(at).chat(_user(CAPITAL)).message
    assert "Paris" in (_model(at).chat([*_user(CAPITAL), first, *_user(CAPITAL)]).message.content or "")


@feature("tools")
def tools(at: Endpoint) -> None:
    model = _model(at)
    answer = model.chat_with_tools([TOOL], user_msg=WEATHER, tool_required=True)
    calls = model.get_tool_calls_from_response(answer)
    assert [call.tool_name for call in calls] == ["get_weather"] and set(calls[0].tool_kwargs) == {"city"}
    assert not at.scripted or calls[0].tool_kwargs == {"city": "Paris"}


@feature("tools, parallel", scripted=True)
def tools_parallel(at: Endpoint) -> None:
    model = _model(at)
    answer = model.chat_with_tools([TOOL], user_msg=TWO_CITIES, allow_parallel_tool_calls=True)
    calls = model.get_tool_calls_from_response(answer)
    assert [call.tool_kwargs["city"] for call in calls] == ["Paris", "Rome"]


@feature("tools, streamed", scripted=True)
def tools_streamed(at: Endpoint) -> None:
    model = _model(at)
    *_, last = model.stream_chat_with_tools([TOOL], user_msg=WEATHER)
    calls = model.get_tool_calls_from_response(last)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("get_weather", {"city": "Paris"})]


async def _run(at: Endpoint, streaming: bool) -> tuple[str, int]:
    agent = FunctionAgent(tools=[get_weather], llm=_model(at), streaming=streaming)
    handler = agent.run(WEATHER)
    n_pieces = 0
    async for event in handler.stream_events():
        n_pieces += isinstance(event, AgentStream) and bool(event.delta)
    return str(await handler), n_pieces


@feature("agent", scripted=True)
def agent(at: Endpoint) -> None:
    assert f"Paris: {REPORT}" in asyncio.run(_run(at, streaming=False))[0]


@feature("agent, streamed", scripted=True)
def agent_streamed(at: Endpoint) -> None:
    answer, n_pieces = asyncio.run(_run(at, streaming=True))
    assert f"Paris: {REPORT}" in answer and n_pieces > 1


@feature("schema as tool")
def as_tool(at: Endpoint) -> None:
    person = _model(at).as_structured_llm(Person).chat(_user(PERSON)).raw
    assert isinstance(person, Person) and (not at.scripted or person == Person(name="Ada Lovelace", age=36))


@feature("JSON schema")
def json_schema(at: Endpoint) -> None:
    person = _model(at, should_use_structured_outputs=True).as_structured_llm(Person).chat(_user(PERSON)).raw
    assert isinstance(person, Person) and (not at.scripted or person == Person(name="Ada Lovelace", age=36))


@feature("logprobs")
def logprobs(at: Endpoint) -> None:
    answer = _model(at, logprobs=True, top_logprobs=2).chat(_user(CAPITAL))
    assert answer.logprobs and all(options[0].logprob <= 0 for options in answer.logprobs)


@feature("images")
def images(at: Endpoint) -> None:
    blocks = [TextBlock(text="What is this?"), ImageBlock(url=PIXEL)]
    answer = _model(at).chat([ChatMessage(role="user", blocks=blocks)])
    assert answer.message.content == "The number of images is 1."


@feature("completions")
def completions(at: Endpoint) -> None:
    model = _model(at, is_chat_model=False, max_tokens=8)
    assert "Paris" in model.complete("The capital of France is").text
    assert "Paris" in [piece.text for piece in model.stream_complete("The capital of France is")][-1]


@feature("error: context")
def context_error(at: Endpoint) -> None:
    with raises(openai.BadRequestError) as caught:
        _model(at).chat(_user(LONG))
    assert caught[0].code == "context_length_exceeded"


@feature("error: model")
def model_error(at: Endpoint) -> None:
    with raises(openai.NotFoundError):
        _model(Endpoint(at.url, "nothing-like-it")).chat(_user(CAPITAL))


if __name__ == "__main__":
    main("llama-index-llms-openai-like")
