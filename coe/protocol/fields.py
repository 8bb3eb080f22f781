"""The fields of OpenAI's requests: used, refused, or ignored.

A request may hold any field that OpenAI documents. A field that would change the answer but is not supported is refused
unless it has its default: an answer that silently lacks a requested feature is worse than an error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

Neutral = tuple[Any, ...]
"""Neutral values of a field: they request nothing."""

_SAMPLING: Final[dict[str, Neutral]] = {
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "n": (None, 1),
    "presence_penalty": (None, 0, 0.0),
}
REFUSED_IN_CHAT: Final[Mapping[str, Neutral]] = _SAMPLING | {
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
REFUSED_IN_COMPLETIONS: Final[Mapping[str, Neutral]] = _SAMPLING | {
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None,),
    "suffix": (None, ""),
}
OF_ENGINES: Final[Mapping[str, Neutral]] = {
    "add_generation_prompt": (None, True),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "ignore_eos": (None, False),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1, 1.0),
    "min_p": (None, 0, 0.0),
    "min_tokens": (None, 0),
    "repetition_penalty": (None, 1, 1.0),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "top_k": (None, -1, 0),
    "use_beam_search": (None, False),
}
"""Fields of both endpoints that OpenAI does not have and vLLM, TGI and their clients send."""
OF_SAMPLING: Final = frozenset({"min_p", "top_k"})
"""Fields of OF_ENGINES that have no effect while the temperature is 0."""
REFUSED_IN_MESSAGES: Final[Mapping[str, Neutral]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
"""Fields that a message copied from an answer carries, empty."""

IGNORED_IN_CHAT: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
IGNORED_IN_COMPLETIONS: Final = frozenset({"user"})
IGNORED_IN_MESSAGES: Final = frozenset({"name", "reasoning", "reasoning_content", "tool_call_id"})
IGNORED_IN_PARTS: Final = frozenset({"cache_control", "prompt_cache_breakpoint"})


def is_neutral(value: object, neutral: Neutral) -> bool:
    """Whether `value` is neutral; `0` is not `false`."""
    return any(type(value) is type(default) and value == default for default in neutral)


MOST_FIELDS: Final = 100
"""Most fields of one object of a request."""
MOST_MESSAGES: Final = 4096
"""Most messages of a request."""
MOST_PARTS: Final = 8192
"""Most parts of all messages together."""
MOST_STOPS: Final = 64
"""Most stop strings."""
MOST_EXPERTS: Final = 10_000
"""Most names in `coe.experts`, and in `coe.exclude`."""
MOST_NAME: Final = 512
"""Most characters of `model` and of the name of an expert."""


COUNTED: Final[Mapping[tuple[str, ...], tuple[type, int, str]]] = {
    (): (dict, MOST_FIELDS, "fields"),
    ("messages",): (list, MOST_MESSAGES, "messages"),
    ("stop",): (list, MOST_STOPS, "strings"),
    ("stream_options",): (dict, MOST_FIELDS, "fields"),
    ("response_format",): (dict, MOST_FIELDS, "fields"),
    ("coe",): (dict, MOST_FIELDS, "fields"),
    ("coe", "experts"): (list, MOST_EXPERTS, "names"),
    ("coe", "exclude"): (list, MOST_EXPERTS, "names"),
}
"""What is counted before a request is validated: place -> type, most elements, what they are."""


def too_many(body: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The places of a body with too many elements, each with the count and the limit."""
    for place, (kind, most, noun) in COUNTED.items():
        value: Any = body
        for name in place:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, kind) and len(value) > most:  # type: ignore[arg-type]
            yield place, f"has {len(value):,} {noun}, at most {most:,} are read"  # type: ignore[arg-type]


_TEXT_PART: Final = frozenset(("type", "text"))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("unicode", "is not text: {reason}", {"reason": error.reason}) from None
    return text


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _content(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """The text of a message. A string, and plain text parts, are not worth a model of each: there may be thousands."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("content", "Input should be a string or an array of text parts")
    text = value if isinstance(value, str) else _joined(value)
    if text is None or not _is_unicode(text):
        value = [{"type": "text", "text": value}] if isinstance(value, str) else value
        text = "".join(part.text for part in validate(value))
    return text


def _joined(parts: list[Any]) -> str | None:
    """The text of plain text parts; None if there are others."""
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.keys() == _TEXT_PART and part["type"] == "text"
    ]
    return "".join(texts) if len(texts) == len(parts) and all(isinstance(text, str) for text in texts) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _part(value: object) -> object:
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise PydanticCustomError("too_many", f"has {len(value):,} fields, at most {MOST_FIELDS} are read")
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "text":
        raise PydanticCustomError(
            "unsupported_value",
            "parts of type {type} are not supported, only text",
            {"type": reprlib.repr(value["type"])},
        )
    return value


def _prompt(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise PydanticCustomError("unsupported_value", "arrays of tokens are not supported: send text")
    if isinstance(value, list) and len(value) > 1:
        raise PydanticCustomError(
            "unsupported_value", "several prompts in one request are not supported: send one request for each"
        )
    if not isinstance(value, str | list) or value == []:
        raise PydanticCustomError("prompt", "Input should be a string")
    return value if isinstance(value, str) else value[0]


def _answer_format(value: object) -> object:
    if isinstance(value, dict) and value.get("type") == "json_schema":
        raise PydanticCustomError(
            "unsupported_value",
            '\'json_schema\' is not supported: take {"type": "json_object"} and describe the object in a message',
        )
    return value


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[str, Field(max_length=MOST_NAME), AfterValidator(_unicode)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text
    cache_control: object = None
    prompt_cache_breakpoint: object = None


if TYPE_CHECKING:
    Content = str
else:
    Content = Annotated[
        list[Annotated[TextPart, BeforeValidator(_part)]], Field(fail_fast=True), WrapValidator(_content)
    ]


class Turn(_Strict):
    """A message of a conversation; `content` is the text of all parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(_Strict):
    """Text, or a JSON object."""

    type: Literal["text", "json_object"]


class Extension(_Strict):
    """The field `coe`: this project's extension of a request.

    experts: names that may answer; exclude: names that may not. cost_weight: quality (score in [0, 1]) given up per
    USD, overriding the policy. seed: breaks ties between experts at random. deadline_s: seconds until the request is
    given up. answers: also return the answer of each called expert.
    """

    experts: Annotated[list[Name], Field(min_length=1, fail_fast=True)] | None = None
    exclude: Annotated[list[Name], Field(fail_fast=True)] | None = None
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    answers: bool | None = None


class CommonFields(_Strict):
    """Fields of both endpoints."""

    model: Annotated[str, Field(min_length=1, max_length=MOST_NAME), AfterValidator(_unicode)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: (
        Annotated[list[Annotated[Text, Field(min_length=1)]], Field(fail_fast=True), BeforeValidator(_one_or_many)]
        | None
    ) = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    coe: Extension | None = None


class ChatFields(CommonFields):
    """Fields of `/v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    response_format: Annotated[ResponseFormat, BeforeValidator(_answer_format)] | None = None


class CompletionFields(CommonFields):
    """Fields of `/v1/completions`."""

    prompt: Annotated[Text, BeforeValidator(_prompt)]
