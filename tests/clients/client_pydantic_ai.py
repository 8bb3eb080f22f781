"""pydantic-ai: agents with tools, and typed answers in its three output modes."""

from __future__ import annotations

from typing import Any

from feature import CAPITAL, LONG, PERSON, PIXEL, REPORT, TWO_CITIES, WEATHER, Endpoint, feature, main, raises
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: {REPORT}"


def _agent(at: Endpoint, model: str | None = None, **options: Any) -> Agent[None, Any]:
    provider = OpenAIProvider(base_url=at.url, api_key="none")
    options.setdefault("model_settings", {"max_tokens": 120})
    return Agent(OpenAIChatModel(model or at.expert, provider=provider), retries=0, **options)


@feature("chat")
def chat(at: Endpoint) -> None:
    result = _agent(at, instructions="Be brief.").run_sync(CAPITAL)
    assert result.output == "The capital of France is Paris." and result.usage.output_tokens > 0


@feature("stream")
def stream(at: Endpoint) -> None:
    result = _agent(at).run_stream_sync(CAPITAL)
    pieces = list(result.stream_text(delta=True, debounce_by=None))
    assert "".join(pieces) == "The capital of France is Paris." and len(pieces) > 1


@feature("history")
def history(at: Endpoint) -> None:
    agent = _agent(at)
    first = agent.run_sync(CAPITAL)
    assert "Paris" in agent.run_sync(CAPITAL, message_history=first.all_messages()).output


@feature("agent", scripted=True)
def with_tool(at: Endpoint) -> None:
    result = _agent(at, tools=[get_weather]).run_sync(WEATHER)
    assert f"Paris: {REPORT}" in result.output and result.usage.tool_calls == 1


@feature("agent, streamed", scripted=True)
def with_tool_streamed(at: Endpoint) -> None:
    result = _agent(at, tools=[get_weather]).run_stream_sync(WEATHER)
    pieces = list(result.stream_text(delta=True, debounce_by=None))
    assert f"Paris: {REPORT}" in "".join(pieces) and len(pieces) > 1


@feature("tools, parallel", scripted=True)
def parallel(at: Endpoint) -> None:
    result = _agent(at, tools=[get_weather]).run_sync(TWO_CITIES)
    assert f"Paris: {REPORT}" in result.output and f"Rome: {REPORT}" in result.output


@feature("agent, typed answer", scripted=True)
def with_tool_typed(at: Endpoint) -> None:
    """A tool, then the tool that is the answer; every call is required."""
    result = _agent(at, tools=[get_weather], output_type=Person).run_sync(WEATHER)
    assert isinstance(result.output, Person) and result.usage.tool_calls == 1


@feature("JSON schema")
def native(at: Endpoint) -> None:
    person = _agent(at, output_type=NativeOutput(Person)).run_sync(PERSON).output
    assert isinstance(person, Person) and (not at.scripted or person == Person(name="Ada Lovelace", age=36))


@feature("JSON schema, streamed")
def native_streamed(at: Endpoint) -> None:
    result = _agent(at, output_type=NativeOutput(Person)).run_stream_sync(PERSON)
    assert isinstance(list(result.stream_output(debounce_by=None))[-1], Person)


@feature("schema as tool")
def as_tool(at: Endpoint) -> None:
    person = _agent(at, output_type=ToolOutput(Person)).run_sync(PERSON).output
    assert isinstance(person, Person) and (not at.scripted or person == Person(name="Ada Lovelace", age=36))


@feature("JSON object", scripted=True)
def prompted(at: Endpoint) -> None:
    """The schema is in the instructions; the answer is a JSON object."""
    person = _agent(at, output_type=PromptedOutput(Person)).run_sync(PERSON).output
    assert isinstance(person, Person)


@feature("logprobs")
def logprobs(at: Endpoint) -> None:
    settings = {"max_tokens": 20, "openai_logprobs": True, "openai_top_logprobs": 2}
    response = _agent(at, model_settings=settings).run_sync(CAPITAL).all_messages()[-1]
    scores = response.provider_details["logprobs"]
    assert "".join(score["token"] for score in scores).startswith(response.text)
    assert all(score["logprob"] <= 0 for score in scores)


@feature("images")
def images(at: Endpoint) -> None:
    image = BinaryContent.from_data_uri(PIXEL)
    assert _agent(at).run_sync(["What is this?", image]).output == "The number of images is 1."


@feature("reasoning")
def reasoning(at: Endpoint) -> None:
    result = _agent(at, model_settings={"max_tokens": 20, "openai_reasoning_effort": "low"}).run_sync(CAPITAL)
    assert "Paris" in result.output
    assert not at.scripted or result.all_messages()[-1].thinking == "The user asks a question."


@feature("error: context")
def context_error(at: Endpoint) -> None:
    with raises(ModelHTTPError) as caught:
        _agent(at).run_sync(LONG)
    assert caught[0].status_code == 400 and caught[0].body["code"] == "context_length_exceeded"


@feature("error: model")
def model_error(at: Endpoint) -> None:
    with raises(ModelHTTPError) as caught:
        _agent(at, "nothing-like-it").run_sync(CAPITAL)
    assert caught[0].status_code == 404


if __name__ == "__main__":
    main("pydantic-ai-slim")
