"""openai-python: chat, streams, `.parse()`, tools, scores, completions, responses, errors."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Final

import openai
from feature import CAPITAL, LONG, OBJECT, PERSON, PIXEL, REPORT, TWO_CITIES, WEATHER, Endpoint, feature, main, raises
from pydantic import BaseModel

TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


NAMED: Final[dict[str, Any]] = {"name": "get_weather"}


class Person(BaseModel):
    name: str
    age: int


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


def _client(at: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=at.url, api_key="none", max_retries=0, timeout=120)


def _user(text: Any) -> Any:
    return [{"role": "user", "content": text}]


@feature("chat")
def chat(at: Endpoint) -> None:
    turns = [{"role": "developer", "content": "Be brief."}, *_user([{"type": "text", "text": CAPITAL}])]
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=turns, max_completion_tokens=20, n=1, user="a", store=False, metadata={"a": "b"}
        )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > answer.usage.prompt_tokens


@feature("stream")
def stream(at: Endpoint) -> None:
    with (
        _client(at) as client,
        client.chat.completions.stream(
            model=at.expert, messages=_user(CAPITAL), max_tokens=20, stream_options={"include_usage": True}
        ) as events,
    ):
        deltas = [event.delta for event in events if event.type == "content.delta"]
        final = events.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "The capital of France is Paris."
    assert len(deltas) > 1 and final.usage is not None and final.usage.completion_tokens > 0


@feature("history")
def history(at: Endpoint) -> None:
    """An answer goes back as the client gave it, with its empty fields."""
    with _client(at) as client:
        first = client.chat.completions.create(model=at.expert, messages=_user(CAPITAL), max_tokens=20)
        turns = [*_user(CAPITAL), first.choices[0].message, *_user(CAPITAL)]
        second = client.chat.completions.create(model=at.expert, messages=turns, max_tokens=20)
    assert "Paris" in (second.choices[0].message.content or "")


@feature("tools")
def tools(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=_user(WEATHER), tools=[TOOL], tool_choice="required", max_tokens=60
        )
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.tool_calls
    call = answer.choices[0].message.tool_calls[0]
    assert call.id and call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    assert not at.scripted or json.loads(call.function.arguments) == {"city": "Paris"}


@feature("tools, named")
def tools_named(at: Endpoint) -> None:
    other = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=_user(CAPITAL), tools=[other, TOOL], tool_choice=named, max_tokens=60
        )
    assert [c.function.name for c in answer.choices[0].message.tool_calls or ()] == ["get_weather"]


@feature("tools, parallel", scripted=True)
def tools_parallel(at: Endpoint) -> None:
    with _client(at) as client:
        create = partial(client.chat.completions.create, model=at.expert, messages=_user(TWO_CITIES), tools=[TOOL])
        several, one = create(), create(parallel_tool_calls=False)
    calls = several.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2 and len(one.choices[0].message.tool_calls or ()) == 1


@feature("tools, streamed", scripted=True)
def tools_streamed(at: Endpoint) -> None:
    with (
        _client(at) as client,
        client.chat.completions.stream(
            model=at.expert,
            messages=_user(WEATHER),
            tools=[openai.pydantic_function_tool(GetWeather, name="get_weather")],
        ) as events,
    ):
        pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        final = events.get_final_completion()
    call = (final.choices[0].message.tool_calls or [])[0]
    assert call.function.parsed_arguments == GetWeather(city="Paris") and final.choices[0].finish_reason == "tool_calls"
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments


@feature("tools, results", scripted=True)
def tools_results(at: Endpoint) -> None:
    """The call and its result go back; the answer is made of the result."""
    with _client(at) as client:
        turns = _user(WEATHER)
        first = client.chat.completions.create(model=at.expert, messages=turns, tools=[TOOL]).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": REPORT} for call in first.tool_calls or ()]
        last = client.chat.completions.create(model=at.expert, messages=[*turns, first, *results], tools=[TOOL])
    assert results and REPORT in (last.choices[0].message.content or "")


@feature("JSON schema")
def parse(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.chat.completions.parse(
            model=at.expert, messages=_user(PERSON), response_format=Person, max_tokens=60
        )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert not at.scripted or person == Person(name="Ada Lovelace", age=36)


@feature("JSON schema, streamed")
def parse_streamed(at: Endpoint) -> None:
    with (
        _client(at) as client,
        client.chat.completions.stream(
            model=at.expert, messages=_user(PERSON), response_format=Person, max_tokens=60
        ) as events,
    ):
        person = events.get_final_completion().choices[0].message.parsed
    assert isinstance(person, Person)


@feature("JSON object")
def json_object(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=_user(OBJECT), response_format={"type": "json_object"}, max_tokens=80
        )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@feature("logprobs")
def logprobs(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=_user(CAPITAL), logprobs=True, top_logprobs=2, max_tokens=20
        )
    scores = answer.choices[0].logprobs.content
    text = "".join(score.token for score in scores)
    assert text.startswith(answer.choices[0].message.content)  # the end token may have a score
    assert all(score.logprob <= 0 and len(score.top_logprobs) == 2 for score in scores)
    assert all(max(top.logprob for top in score.top_logprobs) >= score.logprob - 1e-6 for score in scores)


@feature("n > 1")
def several(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=_user(CAPITAL), n=3, temperature=0.7, seed=1, max_tokens=20
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content for choice in answer.choices)


@feature("images")
def images(at: Endpoint) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    with _client(at) as client:
        answer = client.chat.completions.create(model=at.expert, messages=_user(parts), max_tokens=20)
    assert answer.choices[0].message.content == "The number of images is 1."


@feature("reasoning")
def reasoning(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.chat.completions.create(
            model=at.expert, messages=_user(CAPITAL), reasoning_effort="low", max_tokens=20
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert not at.scripted or answer.choices[0].message.reasoning_content == "The user asks a question."


@feature("completions")
def completions(at: Endpoint) -> None:
    with _client(at) as client:
        one = client.completions.create(model=at.expert, prompt="The capital of France is", max_tokens=8)
        pieces = [
            piece.choices[0].text
            for piece in client.completions.create(
                model=at.expert, prompt="The capital of France is", max_tokens=8, stream=True
            )
        ]
    assert "Paris" in one.choices[0].text and "".join(pieces) == one.choices[0].text


@feature("several prompts")
def several_prompts(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.completions.create(
            model=at.expert, prompt=["The capital of France is", "I count to four: one, two,"], max_tokens=8
        )
    assert [choice.index for choice in answer.choices] == [0, 1] and "Paris" in answer.choices[0].text


@feature("echo with logprobs")
def echo(at: Endpoint) -> None:
    prompt = "The capital of France is"
    with _client(at) as client:
        answer = client.completions.create(model=at.expert, prompt=prompt, max_tokens=1, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text.startswith(prompt) and choice.logprobs is not None
    assert "".join(choice.logprobs.tokens).startswith(prompt)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs)
    assert all(score <= 0 for score in choice.logprobs.token_logprobs[1:])


@feature("responses")
def responses(at: Endpoint) -> None:
    with _client(at) as client:
        create = partial(client.responses.create, model=at.expert, max_output_tokens=20)
        first = create(input=CAPITAL, instructions="Be brief.", store=False)
        second = create(input=[*_user(CAPITAL), *first.output, *_user(CAPITAL)])
    assert "Paris" in first.output_text and "Paris" in second.output_text and first.model == at.expert
    assert first.usage is not None and first.usage.total_tokens > first.usage.input_tokens > 0


@feature("responses, streamed")
def responses_streamed(at: Endpoint) -> None:
    with (
        _client(at) as client,
        client.responses.stream(model=at.expert, input=CAPITAL, max_output_tokens=60) as events,
    ):
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(deltas) == final.output_text and "Paris" in final.output_text and len(deltas) > 1


@feature("responses, tools", scripted=True)
def responses_tools(at: Endpoint) -> None:
    """The items of the answer and the results of its calls go back; the answer is made of the results."""
    flat: Any = {"type": "function", **TOOL["function"]}
    with _client(at) as client:
        create = partial(client.responses.create, model=at.expert, tools=[flat])
        first = create(input=_user(TWO_CITIES))
        calls = [item for item in first.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": REPORT} for call in calls]
        last = create(input=[*_user(TWO_CITIES), *first.output, *results])
        one = create(input=_user(TWO_CITIES), parallel_tool_calls=False, tool_choice={"type": "function", **NAMED})
        with client.responses.stream(model=at.expert, tools=[flat], input=WEATHER) as events:
            streamed = events.get_final_response().output[0]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert REPORT in last.output_text and [item.type for item in one.output] == ["function_call"]
    assert streamed.type == "function_call" and streamed.parsed_arguments == {"city": "Paris"}


@feature("responses, JSON schema")
def responses_parse(at: Endpoint) -> None:
    with _client(at) as client:
        answer = client.responses.parse(model=at.expert, input=PERSON, text_format=Person, max_output_tokens=60)
        with client.responses.stream(model=at.expert, input=PERSON, text_format=Person, max_output_tokens=60) as events:
            streamed = events.get_final_response().output_parsed
    assert isinstance(answer.output_parsed, Person) and isinstance(streamed, Person)


@feature("models")
def models(at: Endpoint) -> None:
    with _client(at) as client:
        assert at.expert in {model.id for model in client.models.list()}
        assert client.models.retrieve(at.expert).id == at.expert


@feature("error: context")
def context_error(at: Endpoint) -> None:
    with _client(at) as client, raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=at.expert, messages=_user(LONG), max_tokens=5)
    assert caught[0].code == "context_length_exceeded", caught[0]


@feature("error: model")
def model_error(at: Endpoint) -> None:
    with _client(at) as client, raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nothing-like-it", messages=_user(CAPITAL))
    assert caught[0].code == "model_not_found"


if __name__ == "__main__":
    main("openai")
