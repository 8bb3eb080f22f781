"""`/v1/responses`: parses OpenAI's request into what a chat request is parsed into, with errors in its own terms.

Nothing is stored: a request has the whole conversation. What would need a store is refused by name (`response_fields`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Final

from pydantic import ValidationError

from coe.protocol import fields as f
from coe.protocol.errors import InvalidFields
from coe.protocol.parsed import Parsed
from coe.protocol.problems import Found, invalid, problem, refused, wrong
from coe.protocol.requests import all_details, parse_chat, request_object
from coe.protocol.response_fields import IGNORED, IGNORED_VALUES, LOGPROBS, REFUSED, FlatChoice, ResponseFields
from coe.protocol.response_input import ITEM
from coe.protocol.response_messages import Messages

_REFUSED: Final = {**f.OF_ENGINES, **REFUSED}
_IGNORED: Final = IGNORED | f.IGNORED_OF_ENGINES
_SAME: Final = (*f.EngineFields.model_fields, "parallel_tool_calls", "top_logprobs")
"""Fields that a chat request has under the same name."""
_PLACES: Final[Mapping[str, str]] = {
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}
"""Fields of a chat request -> those of the request that it is made of."""
_MESSAGE: Final = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class ParsedResponse(Parsed):
    """A parsed request. echo: the fields that its response repeats, with the values that are in effect."""

    echo: Mapping[str, Any] = field(default_factory=dict)


def parse_response(body: object) -> ParsedResponse:
    """The body of `/v1/responses`.

    Raises:
        InvalidRequest: it is not an object, or its fields are wrong: every problem at once.
    """
    whole = request_object(body, measured=False)  # `parse_chat` measures what it is given
    given, ignored = _validated(whole)
    messages = Messages(given.instructions)
    if isinstance(given.input, str):
        messages.messages.append({"role": "user", "content": given.input})
        messages.places.append("input")
    else:
        for i, item in enumerate(given.input):
            messages.add(item, f"input[{i}]")
    try:
        chat = parse_chat(_chat_body(given, whole, messages.messages))
    except InvalidFields as error:
        places = messages.places
        renamed = [replace(each, param=field_of(each.param, places) or each.param) for each in error.problems]
        raise InvalidFields(*renamed, more=error.more) from None
    values = {each.name: getattr(chat, each.name) for each in fields(chat)}
    values["ignored"] = tuple(sorted({*chat.ignored, *ignored, *messages.ignored}))
    return ParsedResponse(**values, echo=_echo(given, chat, whole))


def field_of(param: str | None, places: Sequence[str] = ()) -> str | None:
    """The field of a response request that a field of the chat request was made of.

    Args:
        places: of each chat message, the place of its item.
    """
    if param is None:
        return None
    if (message := _MESSAGE.match(param)) is not None:
        at = int(message[1])
        return places[at] if at < len(places) else "input"
    for prefix in ("tools", "tool_choice"):
        if param.startswith(prefix):
            return param.replace(".function", "", 1)
    return _PLACES.get(param, param)


def _validated(whole: dict[str, Any]) -> tuple[ResponseFields, set[str]]:
    """The fields of a body, and the names of those without effect."""
    problems = list(refused(whole, _REFUSED))
    known = (*ResponseFields.model_fields, *_REFUSED, *_IGNORED)
    try:
        given = ResponseFields.model_validate(
            {name: value for name, value in whole.items() if name not in _REFUSED and name not in _IGNORED}
        )
    except ValidationError as error:
        details = all_details(error, "input", whole.get("input"), ITEM.validate_python)
        raise invalid([*(partial(problem, each, ResponseFields, known) for each in details), *problems]) from None
    problems += _between(given)
    if problems:
        raise invalid(problems)
    return given, set(_without_effect(given, whole))


def _between(given: ResponseFields) -> Iterator[Found]:
    """Problems between fields that are each valid."""
    limit = given.max_output_tokens
    if given.min_tokens and limit is not None and given.min_tokens > limit:
        yield wrong("min_tokens", f"{given.min_tokens} exceeds max_output_tokens, which is {limit}")
    if given.stream_options is not None and not given.stream:
        yield wrong("stream_options", 'only goes with "stream": true')


def _without_effect(given: ResponseFields, whole: Mapping[str, Any]) -> Iterator[str]:
    for name in _IGNORED & whole.keys():
        if whole[name] is not None and not f.is_neutral(whole[name], IGNORED_VALUES.get(name, ())):
            yield name
    if given.text is not None and given.text.verbosity not in (None, "medium"):
        yield "text.verbosity"
    if given.reasoning is not None:
        for name in ("summary", "generate_summary", "context", "mode"):
            if getattr(given.reasoning, name) not in (None, "standard"):
                yield f"reasoning.{name}"
    if any(value != LOGPROBS for value in given.include or ()):
        yield "include"
    if given.stream_options is not None and given.stream_options.include_obfuscation:
        yield "stream_options.include_obfuscation"


def _chat_body(
    given: ResponseFields, whole: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The same request as a body of `/v1/chat/completions`."""
    chat = {name: whole[name] for name in _SAME if name in whole} | {"messages": messages}
    if given.max_output_tokens is not None:
        chat["max_completion_tokens"] = given.max_output_tokens
    if given.tools is not None:
        chat["tools"] = [tool.chat for tool in given.tools]
    if given.tool_choice is not None:
        chat["tool_choice"] = given.tool_choice
        if isinstance(given.tool_choice, FlatChoice):
            chat["tool_choice"] = {"type": "function", "function": {"name": given.tool_choice.name}}
    if given.text is not None and given.text.format is not None:
        chat["response_format"] = given.text.format.chat
    if given.reasoning is not None and given.reasoning.effort is not None:
        chat["reasoning_effort"] = given.reasoning.effort
    if given.top_logprobs or LOGPROBS in (given.include or ()):
        chat["logprobs"] = True
    return chat


def _echo(given: ResponseFields, chat: Parsed, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What a response repeats of its request, with the defaults that were in effect."""
    text_format = given.text.format if given.text is not None else None
    choice = given.tool_choice
    return {
        "background": False,
        "instructions": given.instructions,
        "max_output_tokens": given.max_output_tokens,
        "max_tool_calls": None,
        "metadata": given.metadata or {},
        "parallel_tool_calls": given.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": given.reasoning.effort if given.reasoning else None, "summary": None},
        "store": False,
        "temperature": chat.request.temperature,
        "text": {"format": {"type": "text"} if text_format is None else text_format.document},
        "tool_choice": choice.model_dump() if isinstance(choice, FlatChoice) else choice or "auto",
        "tools": [tool.document for tool in given.tools or ()],
        "top_logprobs": given.top_logprobs or 0,
        "top_p": chat.request.top_p,
        "truncation": "disabled",
    }
