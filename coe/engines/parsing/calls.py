"""The tool calls in a region of an answer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from coe.engines.parsing.response_format import Budget

_SEPARATORS: Final = " \t\r\n;,"
_MOST_NAME_CHARACTERS: Final = 256
_MOST_DELIMITED: Final = 32_768
_PLAIN_PARSERS: Final = ("text", "int", "float", "bool", "json")
_PYTHON: Final = {"True": "true", "False": "false", "None": "null"}
_ERRORS: Final = (ValueError, TypeError, KeyError, LookupError, AttributeError, RecursionError)
"""What reading the text of a model by a template may raise."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call: a name, and arguments as JSON text."""

    name: str
    arguments: str


def read_calls(
    region: Mapping[str, Any], field: Any, tools: Sequence[Mapping[str, Any]], budget: Budget
) -> tuple[list[Call], str]:
    """The calls of a region, and the text after them. Without calls, all of it is text.

    A region that no markup opens is JSON like any other, such as `{"name": "Ada", "age": 36}`: it is a call only if it
    has the name of an offered tool.

    Args:
        region: the `body` of the region, its `opening`, and the `groups` that this captured.
        field: its field in transformers' response template.
        tools: those offered; their schemas give the types of arguments that are written as plain text.
    """
    body: str = region["body"]
    try:
        values, rest = _values(body, field, tools, budget)
        shaped = [_shaped(value, field, region.get("groups", {})) for value in values]
        calls = [call for value in shaped for call in _calls(value)]
        if field.content != "json":
            calls = [_typed(call, tools) for call in calls]
    except _ERRORS:
        return [], body
    if not calls or (rest and field.close_re is not None):
        return [], body
    if not region.get("opening", "").strip() and not _schemas(tools).keys() >= {call.name for call in calls}:
        return [], body
    return calls, rest


def _values(body: str, field: Any, tools: Sequence[Mapping[str, Any]], budget: Budget) -> tuple[Sequence[Any], str]:
    """What the content of a region states, before its transform, and the text that follows."""
    if field.content == "json" and not field.content_args:
        return _json_values(body)
    if field.content == "xml-inline":
        return [_tags(body, field.content_args, budget)], ""
    from transformers.utils.chat_parsing.content_parsers import parse_content

    _check_plain(field.content_args, body)
    return [parse_content(body, field.content, field.content_args)], ""


def _json_values(body: str) -> tuple[Sequence[Any], str]:
    """JSON values in a row, with separators between them, and the text after the last."""
    values: list[Any] = []
    place = _skip(body, 0)
    while place < len(body):
        try:
            value, place = _DECODER.raw_decode(body, place)
        except ValueError:
            if not values:
                raise
            break
        values.append(value)
        place = _skip(body, place)
    return values, body[place:]


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SEPARATORS:
        place += 1
    return place


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


_DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant, strict=False)
"""Of JSON that a model writes: line breaks in strings are common, and harmless."""


def _tags(body: str, args: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """Keys and values of a region of tags: the content parser `xml-inline` of transformers, with a limit of time."""
    import regex  # type: ignore[import-untyped]  # has no stubs of its own
    from transformers.utils.chat_parsing.content_parsers import parse_content

    _check_plain(args, body)
    value_parser, found = args.get("value_parser"), dict[str, Any]()
    began = time.thread_time()
    try:
        pattern = regex.compile(args["tag_pattern"], regex.DOTALL)
        for match in pattern.finditer(body, timeout=max(budget.left_s, 1e-3)):
            value: Any = match["value"]
            if value_parser is not None:
                value = parse_content(value, value_parser.get("name", "text"), value_parser.get("args", {}))
            key = match["key"]
            if args.get("merge_duplicates") and key in found:
                value = [*(found[key] if isinstance(found[key], list) else [found[key]]), value]
            found[key] = value
    except TimeoutError:
        raise budget.exceeded() from None
    budget.spend(time.thread_time() - began)
    return found


def _check_plain(args: Mapping[str, Any], body: str) -> None:
    """Raises ValueError if reading the content with these arguments may take more than linear time."""
    inner = args.get("value_parser") or {}
    if inner.get("name", "text") not in _PLAIN_PARSERS or inner.get("args"):
        raise ValueError("a parser inside a parser is not supported")
    if any(opening != closing for opening, closing in args.get("string_delims", [])) and len(body) > _MOST_DELIMITED:
        raise ValueError(f"more than {_MOST_DELIMITED:,} characters")


def _shaped(value: Any, field: Any, groups: Mapping[str, str]) -> Any:
    """The value in the form that the template's `transform` gives it."""
    if field.transform is None:
        return value
    from transformers.utils.chat_parsing.content_parsers import process_field

    return process_field(json.dumps(value), replace(field, content="json", content_args={}), dict(groups))


def _calls(value: Any) -> Iterator[Call]:
    """The calls of a value in the form of OpenAI, Hermes or Llama, or of a list of such; fails if it is none."""
    if isinstance(value, list):
        for each in value:
            yield from _calls(each)
        return
    function = value.get("function", value)
    if isinstance(function, str):  # Llama 3.2: {"type": "function", "function": NAME, "parameters": {...}}
        function = {**value, "name": function}
    name, arguments = function["name"], function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME_CHARACTERS or not isinstance(arguments, dict):
        raise ValueError("not a call: it needs a name, and an object of arguments")
    yield _call(name, arguments)


def _call(name: str, arguments: Mapping[str, Any]) -> Call:
    """The call as text; a lone surrogate, which JSON can write and UTF-8 cannot, is `?`."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return Call(*(each.encode("utf-8", "replace").decode() for each in (name, text)))


def _typed(call: Call, tools: Sequence[Mapping[str, Any]]) -> Call:
    """The call with arguments of the types that the schema of its tool states; they were written as plain text."""
    schema = _schemas(tools).get(call.name)
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return call
    arguments = {name: _cast(value, properties.get(name)) for name, value in json.loads(call.arguments).items()}
    return _call(call.name, arguments)


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}


def _cast(value: Any, schema: Any) -> Any:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if not isinstance(value, str) or kinds is None or "string" in ([kinds] if isinstance(kinds, str) else kinds):
        return value
    text = value.strip()
    try:
        return _DECODER.decode(_PYTHON.get(text, text))
    except (ValueError, RecursionError):
        return value
