"""instructor: typed answers through tools, JSON schemas and JSON objects, and streams of partial answers."""

from __future__ import annotations

from typing import Any

import instructor
import openai
from feature import CAPITAL, LONG, PERSON, TWO_CITIES, Endpoint, feature, main, raises
from instructor.core import InstructorRetryException
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


def _create(at: Endpoint, mode: instructor.Mode, text: str, answer: Any, **options: Any) -> Any:
    client = instructor.from_openai(openai.OpenAI(base_url=at.url, api_key="none", max_retries=0), mode=mode)
    messages = [{"role": "user", "content": text}]
    options = {"model": at.expert, "max_retries": 0, "max_tokens": 80} | options
    return client.chat.completions.create(messages=messages, response_model=answer, **options)


def _is_ada(at: Endpoint, person: object) -> bool:
    assert isinstance(person, Person)  # of a class that instructor derives
    return not at.scripted or (person.name, person.age) == ("Ada Lovelace", 36)


@feature("chat")
def chat(at: Endpoint) -> None:
    answer = _create(at, instructor.Mode.TOOLS, CAPITAL, None)
    assert answer.choices[0].message.content == "The capital of France is Paris."


@feature("schema as tool")
def as_tool(at: Endpoint) -> None:
    assert _is_ada(at, _create(at, instructor.Mode.TOOLS, PERSON, Person))


@feature("tools, streamed", scripted=True)
def as_tool_streamed(at: Endpoint) -> None:
    """Partial answers become complete."""
    parts = list(_create(at, instructor.Mode.TOOLS, PERSON, instructor.Partial[Person], stream=True))
    assert len(parts) > 1 and (parts[-1].name, parts[-1].age) == ("Ada Lovelace", 36)


@feature("tools, parallel", scripted=True)
def parallel(at: Endpoint) -> None:
    from collections.abc import Iterable

    calls = list(_create(at, instructor.Mode.PARALLEL_TOOLS, TWO_CITIES, Iterable[GetWeather]))
    assert calls == [GetWeather(city="Paris"), GetWeather(city="Rome")]


@feature("JSON schema")
def json_schema(at: Endpoint) -> None:
    assert _is_ada(at, _create(at, instructor.Mode.JSON_SCHEMA, PERSON, Person))


@feature("JSON schema, streamed")
def json_schema_streamed(at: Endpoint) -> None:
    *_, last = _create(at, instructor.Mode.JSON_SCHEMA, PERSON, instructor.Partial[Person], stream=True)
    assert isinstance(last.name, str) and isinstance(last.age, int)


@feature("JSON object", scripted=True)
def json_object(at: Endpoint) -> None:
    """The schema is in the prompt; the answer is a JSON object."""
    assert _is_ada(at, _create(at, instructor.Mode.JSON, PERSON, Person))


@feature("error: context")
def context_error(at: Endpoint) -> None:
    with raises(InstructorRetryException, openai.BadRequestError) as caught:
        _create(at, instructor.Mode.TOOLS, LONG, None)
    assert "context_length_exceeded" in str(caught[0])


@feature("error: model")
def model_error(at: Endpoint) -> None:
    with raises(InstructorRetryException, openai.NotFoundError) as caught:
        _create(at, instructor.Mode.TOOLS, PERSON, Person, model="nothing-like-it")
    assert "model_not_found" in str(caught[0])


if __name__ == "__main__":
    main("instructor")
