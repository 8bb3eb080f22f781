"""Problems of a request, described for a client: the field, what is expected, what was given.

Bodies are hostile: at most MOST_PROBLEMS problems are described, and at most MOST_SHOWN characters of a value repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from coe.protocol import fields as f
from coe.protocol.errors import MOST_COUNTED, FieldProblem, InvalidFields
from coe.protocol.messages import Call, CalledFunction, ImagePart, ImageUrl, RefusalPart, TextPart, ThinkingPart, Turn
from coe.protocol.tools import Function, JsonSchema, NamedChoice, NamedFunction, ResponseFormat, Tool
from registry.documents import dotted
from registry.spelling import did_you_mean

MOST_PROBLEMS: Final = 20
"""Most problems that an error lists; it counts the others."""
MOST_SUGGESTED: Final = 3
"""Most problems of an error for which a close name is searched."""
MOST_SHOWN: Final = 80
"""Most characters of a value or a field name that an error repeats."""
Found = Callable[[bool], FieldProblem]
"""A problem that is described when it is listed; true: search for a close name."""
_OWN_WORDS: Final = re.compile("^(Input|String) ")
_CODES: Final = {
    "too_many": "too_many",
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_value": "unsupported_value",
}
_PLAIN: Final = frozenset({"unsupported_value", "unicode", "too_many", "prompt_element", "format", "schema"})
"""Kinds of errors whose message is complete without the value."""
_MODELS: Final[Mapping[tuple[str, ...], type[BaseModel]]] = {
    ("coe",): f.Extension,
    ("coe", "session"): f.Session,
    ("stream_options",): f.StreamOptions,
    ("response_format",): ResponseFormat,
    ("response_format", "json_schema"): JsonSchema,
    ("messages", "content"): TextPart,
    ("messages", "content", "<text>"): TextPart,
    ("messages", "content", "<image_url>"): ImagePart,
    ("messages", "content", "<image_url>", "image_url"): ImageUrl,
    ("messages", "content", "<refusal>"): RefusalPart,
    ("messages", "content", "<thinking>"): ThinkingPart,
    ("messages", "tool_calls"): Call,
    ("messages", "tool_calls", "function"): CalledFunction,
    ("tools",): Tool,
    ("tools", "function"): Function,
    ("tool_choice",): NamedChoice,
    ("tool_choice", "function"): NamedFunction,
}
"""The models of inner objects, by their place without indices; `Strict.inner_models` adds those of one request."""


def invalid(found: Sequence[Found]) -> InvalidFields:
    """The error of at least one problem. Only those that it lists are described: there may be very many."""
    listed = [describe(i < MOST_SUGGESTED) for i, describe in enumerate(found[:MOST_PROBLEMS])]
    return InvalidFields(*listed, more=min(len(found), MOST_COUNTED) - len(listed))


def wrong(param: str, message: str, code: str = "invalid_value") -> Found:
    """A problem with its whole message."""
    problem = FieldProblem(param, code, message)
    return lambda _: problem


def unknown_expert(experts: Collection[str], param: str, name: str, suggest: bool) -> FieldProblem:
    """An expert that is not registered."""
    close = did_you_mean(name, experts) if suggest else ""
    return FieldProblem(param, "unknown_expert", f"{cut(name)!r} is not registered{close}")


def refused(body: Mapping[str, object], fields: Mapping[str, f.Neutral], place: str = "") -> Iterator[Found]:
    """The fields of an object that request what is not supported."""
    if fields.keys().isdisjoint(body):
        return
    for name, neutral in fields.items():
        if name in body and not f.is_neutral(body[name], neutral):
            yield partial(_unsupported, place, name, body[name], neutral)


def _unsupported(place: str, name: str, value: object, neutral: f.Neutral, suggest: bool) -> FieldProblem:
    only = f", only {shown(neutral[1])}" if len(neutral) > 1 else ": leave it out"
    instead = f"; send {f.INSTEAD[name]}" if name in f.INSTEAD else ""
    text = f"{shown(value)} is not supported here{only}{instead}"
    return FieldProblem(place + name, "unsupported_parameter", text)


def problem(detail: ErrorDetails, model: type[BaseModel], known: Collection[str], suggest: bool) -> FieldProblem:
    """A pydantic error for a client."""
    kind, loc = detail["type"], detail["loc"]
    place = tuple(name for name in loc if not (isinstance(name, str) and name.startswith("<")) and name != "[key]")
    if kind == "string_unicode":
        return FieldProblem(dotted(place) or "body", "invalid_value", f"holds no text: {shown(detail['input'])}")
    param = dotted(tuple(cut(name) if isinstance(name, str) else name for name in place))
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "missing":
        return FieldProblem(param, code, "is required")
    if kind in ("too_short", "string_too_short"):
        return FieldProblem(param, code, "must not be empty")
    if kind == "extra_forbidden":
        close = did_you_mean(str(loc[-1]), _names(loc, model, known)) if suggest else ""
        return FieldProblem(param, code, f"is not a known field{close}")
    if kind == "prompt_element":
        context = detail["ctx"]
        return FieldProblem(param + context["place"], "invalid_value", context["message"])
    expected = "should be an object" if kind in ("model_type", "dict_type") else _OWN_WORDS.sub("", detail["msg"])
    got = "" if kind in _PLAIN else f", got {shown(detail['input'])}"
    return FieldProblem(param, code, expected + got)


def _names(loc: tuple[int | str, ...], model: type[BaseModel], known: Collection[str]) -> Collection[str]:
    """The known fields of the object of an unknown field."""
    place = tuple(name for name in loc[:-1] if isinstance(name, str))
    if not place:
        return known
    if place == ("messages",):
        return (*Turn.model_fields, *f.REFUSED_IN_MESSAGES, *f.IGNORED_IN_MESSAGES)
    inner: Mapping[tuple[str, ...], type[BaseModel]] = getattr(model, "inner_models", {})
    found = inner.get(place) or _MODELS.get(place)
    return [field.alias or name for name, field in found.model_fields.items()] if found else ()


def shown(value: object) -> str:
    """A JSON value, shortened."""
    pieces, length = [], 0
    for piece in json.JSONEncoder(default=repr).iterencode(value[:MOST_SHOWN] if isinstance(value, str) else value):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_SHOWN:  # the rest may be megabytes
            break
    text = "".join(pieces)
    is_cut = length > MOST_SHOWN or (isinstance(value, str) and len(value) > MOST_SHOWN)
    return text[: MOST_SHOWN - 3] + "..." if is_cut else text


def cut(name: str) -> str:
    """A name of the client's, shortened, and without lone surrogates."""
    name = name if len(name) <= MOST_SHOWN else name[: MOST_SHOWN - 3] + "..."
    return name.encode("utf-8", "replace").decode()
