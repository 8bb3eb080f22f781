"""OpenAI's requests: parses a JSON body into a `GenerateRequest` and a `Query`, or reports every problem at once.

An absent `temperature` is 0, not OpenAI's 1: answers are greedy and repeatable unless sampling is requested.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from coe.errors import InvalidRequest
from coe.protocol import fields as f
from coe.protocol.errors import FieldProblem, InvalidFields
from coe.types import GenerateRequest
from registry.documents import dotted
from registry.spelling import did_you_mean
from routers.base import Message, Query

_ModelT = TypeVar("_ModelT", bound=f.CommonFields)
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_value": "unsupported_value",
}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed request.

    Attributes:
        model: `auto`, `coe/<policy>`, or an expert's name.
        query: what a router may look at; without `exclude`, see `query_among`.
        include_usage: a stream ends with a chunk that has the usage.
        ignored: given fields without effect, sorted.
        exclude: experts that may not answer.
        answers: also return the answer of each called expert.
    """

    model: str
    request: GenerateRequest
    query: Query
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    exclude: frozenset[str] = frozenset()
    answers: bool = False

    def query_among(self, experts: Collection[str]) -> Query:
        """The query, restricted to the registered `experts` that are allowed and not excluded.

        Raises:
            InvalidFields: an allowed or excluded expert is not registered, or none is left.
        """
        named = {"coe.experts": self.query.allowed or frozenset(), "coe.exclude": self.exclude}
        problems = [
            FieldProblem(param, "unknown_expert", f"{name!r} is not registered{did_you_mean(name, experts)}")
            for param, names in named.items()
            for name in sorted(names.difference(experts))
        ]
        if problems:
            raise InvalidFields(*problems)
        if not self.exclude:
            return self.query
        allowed = (self.query.allowed or frozenset(experts)) - self.exclude
        if not allowed:
            raise InvalidFields(FieldProblem("coe.exclude", "no_eligible_expert", "excludes every allowed expert"))
        return replace(self.query, allowed=allowed)


def parse_chat(body: object) -> Parsed:
    """The body of `/v1/chat/completions`.

    Raises:
        InvalidRequest: it is not an object, or its fields are wrong: every problem at once.
    """
    whole = _object(body)
    messages, problems, ignored = _turns(whole.get("messages"))
    given = {**whole, "messages": messages} if "messages" in whole else whole
    chat, more, also = _validate(given, f.ChatFields, f.REFUSED_IN_CHAT, f.IGNORED_IN_CHAT)
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None} if chat else set()
    if len(limits) > 1:
        more.append(
            FieldProblem("max_tokens", "invalid_value", "max_tokens and max_completion_tokens differ: give one")
        )
    if chat is None or problems or more:
        raise InvalidFields(*more, *problems)
    is_json = chat.response_format is not None and chat.response_format.type == "json_object"
    request = GenerateRequest(
        messages=tuple(map(_message, chat.messages)),
        format="json" if is_json else "text",
        **_sampling(chat, chat.max_completion_tokens or chat.max_tokens),
    )
    return _parsed(chat, request, ignored | also)


def parse_completion(body: object) -> Parsed:
    """The body of `/v1/completions`: one prompt, as text.

    Raises:
        InvalidRequest: it is not an object, or its fields are wrong: every problem at once.
    """
    completion, problems, ignored = _validate(
        _object(body), f.CompletionFields, f.REFUSED_IN_COMPLETIONS, f.IGNORED_IN_COMPLETIONS
    )
    if completion is None or problems:
        raise InvalidFields(*problems)
    request = GenerateRequest(prompt=completion.prompt, **_sampling(completion, completion.max_tokens))
    return _parsed(completion, request, ignored)


def _object(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object with the fields of a request, got {_shown(body)}")
    return body


def _sampling(fields: f.CommonFields, max_tokens: int | None) -> dict[str, Any]:
    return {
        "max_tokens": max_tokens,
        "temperature": fields.temperature or 0.0,
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "stop": tuple(fields.stop or ()),
        "seed": fields.seed,
        "deadline_s": fields.coe.deadline_s if fields.coe else None,
        "stream": bool(fields.stream),
    }


def _message(turn: f.Turn) -> Message:
    role = "system" if turn.role == "developer" else turn.role
    return Message(role, "".join(part.text for part in turn.content))


def _parsed(fields: f.CommonFields, request: GenerateRequest, ignored: set[str]) -> Parsed:
    own = fields.coe or f.Extension()
    query = Query(
        request.messages or (Message("user", request.prompt or ""),),
        format=request.format,
        allowed=None if own.experts is None else frozenset(own.experts),
        cost_weight=own.cost_weight,
        seed=own.seed,
    )
    return Parsed(
        fields.model,
        request,
        query,
        stream=request.stream,
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        ignored=tuple(sorted(ignored)),
        exclude=frozenset(own.exclude or ()),
        answers=bool(own.answers),
    )


def _turns(messages: object) -> tuple[object, list[FieldProblem], set[str]]:
    """The messages without refused or ignored fields, the problems, and the ignored fields."""
    if not isinstance(messages, list):
        return messages, [], set()
    turns: list[object] = []
    problems: list[FieldProblem] = []
    ignored: set[str] = set()
    for i, turn in enumerate(messages):
        if not isinstance(turn, dict):
            turns.append(turn)
            continue
        place = f"messages[{i}]"
        problems += _refused(turn, f.REFUSED_IN_MESSAGES, f"{place}.")
        ignored |= {f"messages[].{name}" for name in f.IGNORED_IN_MESSAGES if turn.get(name) is not None}
        turns.append(_without(turn, f.REFUSED_IN_MESSAGES, f.IGNORED_IN_MESSAGES))
    return turns, problems, ignored


def _validate(
    body: dict[str, Any], model: type[_ModelT], refused: Mapping[str, f.Neutral], ignored: Collection[str]
) -> tuple[_ModelT | None, list[FieldProblem], set[str]]:
    """The used fields, the problems of the body, and the names of the ignored fields."""
    problems = list(_refused(body, refused))
    given = {name for name in ignored if body.get(name) is not None}
    known = (*model.model_fields, *refused, *ignored)
    try:
        fields = model.model_validate(_without(body, refused, ignored))
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [*(_problem(detail, model, known) for detail in details), *problems], given
    if fields.stream_options is not None:
        if not fields.stream:
            problems.append(FieldProblem("stream_options", "invalid_value", 'only goes with "stream": true'))
        given |= {"stream_options.include_obfuscation"} if fields.stream_options.include_obfuscation else set()
    return fields, problems, given


def _without(body: Mapping[str, Any], refused: Collection[str], ignored: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in refused and name not in ignored}


def _refused(body: Mapping[str, Any], refused: Mapping[str, f.Neutral], place: str = "") -> Iterator[FieldProblem]:
    for name, neutral in refused.items():
        if name in body and not f.is_neutral(body[name], neutral):
            only = f", only {_shown(neutral[1])}" if len(neutral) > 1 else ": leave it out"
            yield FieldProblem(
                place + name, "unsupported_parameter", f"{_shown(body[name])} is not supported here{only}"
            )


def _problem(detail: ErrorDetails, model: type[BaseModel], known: Collection[str]) -> FieldProblem:
    """A pydantic error for a client: the field, the expected and the given value."""
    kind, loc = detail["type"], detail["loc"]
    param = dotted(loc)
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "missing":
        return FieldProblem(param, code, "is required")
    if kind in ("too_short", "string_too_short"):
        return FieldProblem(param, code, "must not be empty")
    if kind == "extra_forbidden":
        return FieldProblem(param, code, f"is not a known field{did_you_mean(str(loc[-1]), _names(model, loc, known))}")
    expected = "should be an object" if kind in ("model_type", "dict_type") else detail["msg"].removeprefix("Input ")
    got = "" if kind in ("unsupported_value", "unicode") else f", got {_shown(detail['input'])}"
    return FieldProblem(param, code, expected + got)


def _names(model: type[BaseModel], loc: tuple[int | str, ...], known: Collection[str]) -> Collection[str]:
    """The known fields at `loc`."""
    inner: dict[str, Collection[str]] = {
        "coe": f.Extension.model_fields,
        "stream_options": f.StreamOptions.model_fields,
        "response_format": f.ResponseFormat.model_fields,
        "messages": (*f.Turn.model_fields, *f.REFUSED_IN_MESSAGES, *f.IGNORED_IN_MESSAGES),
    }
    if len(loc) == 1:
        return known
    return f.TextPart.model_fields if "content" in loc else inner[str(loc[0])]


def _shown(value: object) -> str:
    """A JSON value, shortened."""
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
