"""LiteLLM: its completion call, tools, schemas, and its own classes of errors."""

from __future__ import annotations

import json
from typing import Any, Final

import litellm
from feature import CAPITAL, LONG, OBJECT, PERSON, PIXEL, REPORT, TWO_CITIES, WEATHER, Endpoint, feature, main, raises
from pydantic import BaseModel

TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str
    age: int


def _ask(at: Endpoint, messages: Any, model: str | None = None, **options: Any) -> Any:
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    options.setdefault("max_tokens", 80)
    return litellm.completion(
        model=f"openai/{model or at.expert}",
        api_base=at.url,
        api_key="none",
        messages=turns,
        num_retries=0,
        timeout=120,
        **options,
    )


@feature("chat")
def chat(at: Endpoint) -> None:
    answer = _ask(at, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CAPITAL}])
    assert answer.choices[0].message.content == "The capital of France is Paris." and answer.usage.completion_tokens > 0


@feature("stream")
def stream(at: Endpoint) -> None:
    pieces = list(_ask(at, CAPITAL, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(pieces)
    assert whole.choices[0].message.content == "The capital of France is Paris." and len(pieces) > 2
    assert whole.usage.completion_tokens > 0


@feature("history")
def history(at: Endpoint) -> None:
    first = _ask(at, CAPITAL).choices[0].message
    user = {"role": "user", "content": CAPITAL}
    assert "Paris" in _ask(at, [user, first.model_dump(), user]).choices[0].message.content


@feature("tools")
def tools(at: Endpoint) -> None:
    answer = _ask(at, WEATHER, tools=[TOOL], tool_choice="required").choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


@feature("tools, named")
def tools_named(at: Endpoint) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = _ask(at, CAPITAL, tools=[TOOL], tool_choice=named).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["get_weather"]


@feature("tools, parallel", scripted=True)
def tools_parallel(at: Endpoint) -> None:
    several = _ask(at, TWO_CITIES, tools=[TOOL]).choices[0].message.tool_calls
    one = _ask(at, TWO_CITIES, tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in several] == ["Paris", "Rome"] and len(one) == 1


@feature("tools, streamed", scripted=True)
def tools_streamed(at: Endpoint) -> None:
    whole = litellm.stream_chunk_builder(list(_ask(at, WEATHER, tools=[TOOL], stream=True)))
    call = whole.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


@feature("tools, results", scripted=True)
def tools_results(at: Endpoint) -> None:
    turns: list[Any] = [{"role": "user", "content": WEATHER}]
    turns.append(_ask(at, turns, tools=[TOOL]).choices[0].message.model_dump())
    turns += [{"role": "tool", "tool_call_id": call["id"], "content": REPORT} for call in turns[-1]["tool_calls"]]
    assert REPORT in _ask(at, turns, tools=[TOOL]).choices[0].message.content


@feature("JSON schema")
def json_schema(at: Endpoint) -> None:
    person = Person.model_validate_json(_ask(at, PERSON, response_format=Person).choices[0].message.content)
    assert not at.scripted or person == Person(name="Ada Lovelace", age=36)


@feature("JSON object")
def json_object(at: Endpoint) -> None:
    answer = _ask(at, OBJECT, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@feature("logprobs")
def logprobs(at: Endpoint) -> None:
    answer = _ask(at, CAPITAL, logprobs=True, top_logprobs=2).choices[0]
    scores = answer.logprobs.content
    assert "".join(score.token for score in scores).startswith(answer.message.content)
    assert all(score.logprob <= 0 and len(score.top_logprobs) == 2 for score in scores)


@feature("n > 1")
def several(at: Endpoint) -> None:
    assert len(_ask(at, CAPITAL, n=3, temperature=0.7, seed=1, max_tokens=20).choices) == 3


@feature("images")
def images(at: Endpoint) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    answer = _ask(at, [{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "The number of images is 1."


@feature("reasoning")
def reasoning(at: Endpoint) -> None:
    options = {"reasoning_effort": "low", "allowed_openai_params": ["reasoning_effort"]}
    message = _ask(at, CAPITAL, **options).choices[0].message
    assert "Paris" in message.content
    assert not at.scripted or message.reasoning_content == "The user asks a question."


@feature("completions")
def completions(at: Endpoint) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{at.expert}",
        api_base=at.url,
        api_key="none",
        prompt="The capital of France is",
        max_tokens=8,
    )
    assert "Paris" in answer.choices[0].text


@feature("error: context")
def context_error(at: Endpoint) -> None:
    with raises(litellm.ContextWindowExceededError):
        _ask(at, LONG)


@feature("error: model")
def model_error(at: Endpoint) -> None:
    with raises(litellm.NotFoundError):
        _ask(at, CAPITAL, "nothing-like-it")


if __name__ == "__main__":
    main("litellm")
