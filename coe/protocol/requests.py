"""OpenAI's requests: parses a JSON body into a `GenerateRequest` and a `Query`, or reports every problem at once.

Bodies are hostile: elements are counted before they are validated, and at most MOST_PROBLEMS problems are described.

An absent `temperature` is 0, not OpenAI's 1: answers are greedy and repeatable unless sampling is requested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import nsmallest
from itertools import islice
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from coe.errors import InvalidRequest
from coe.protocol import fields as f
from coe.protocol.errors import MOST_COUNTED, FieldProblem, InvalidFields
from coe.types import GenerateRequest
from registry.documents import dotted
from registry.spelling import did_you_mean
from routers.base import Message, Query

MOST_PROBLEMS: Final = 20
"""Most problems that an error lists; it counts the others."""
MOST_SUGGESTED: Final = 3
"""Most problems of an error for which a close name is searched."""
MOST_SHOWN: Final = 80
"""Most characters of a value or a field name that an error repeats."""
_REFUSED_IN_CHAT: Final = {**f.OF_ENGINES, "echo": (None, False), **f.REFUSED_IN_CHAT}
_REFUSED_IN_COMPLETIONS: Final = {**f.OF_ENGINES, **f.REFUSED_IN_COMPLETIONS}
_EXTRA: Final = frozenset((*f.REFUSED_IN_MESSAGES, *f.IGNORED_IN_MESSAGES))
_Found = Callable[[bool], FieldProblem]
"""A problem that is described when it is listed; true: search for a close name."""
_ModelT = TypeVar("_ModelT", bound=f.CommonFields)
_CODES = {
    "too_many": "too_many",
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
        if self.query.allowed is None and not self.exclude:
            return self.query
        named = {"coe.experts": self.query.allowed or frozenset(), "coe.exclude": self.exclude}
        unknown = [
            (param, name)
            for param, names in named.items()
            for name in nsmallest(MOST_COUNTED, names.difference(experts))
        ]
        if unknown:
            raise _invalid([partial(_unknown_expert, experts, *each) for each in unknown])
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
    chat, more, also = _validate(given, f.ChatFields, _REFUSED_IN_CHAT, f.IGNORED_IN_CHAT)
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None} if chat else set()
    if len(limits) > 1:
        differ = FieldProblem("max_tokens", "invalid_value", "max_tokens and max_completion_tokens differ: give one")
        more.append(lambda _: differ)
    if chat is None or problems or more:
        raise _invalid([*more, *problems])
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
        _object(body), f.CompletionFields, _REFUSED_IN_COMPLETIONS, f.IGNORED_IN_COMPLETIONS
    )
    if completion is None or problems:
        raise _invalid(problems)
    request = GenerateRequest(prompt=completion.prompt, **_sampling(completion, completion.max_tokens))
    return _parsed(completion, request, ignored)


def _object(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object with the fields of a request, got {_shown(body)}")
    problems = [FieldProblem(".".join(place) or "body", "too_many", text) for place, text in f.too_many(body)]
    if problems:
        raise InvalidFields(*problems)
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
    return Message(role, turn.content)


def _parsed(fields: f.CommonFields, request: GenerateRequest, ignored: set[str]) -> Parsed:
    own = fields.coe or f.Extension()
    query = Query(
        request.messages or (Message("user", request.prompt or ""),),
        tools=request.offered,
        format=request.format,
        needs=request.needs,
        allowed=None if own.experts is None else frozenset(own.experts),
        cost_weight=own.cost_weight,
        seed=own.seed,
        max_tokens=request.max_tokens,
        raw=request.prompt is not None,
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


def _turns(messages: object) -> tuple[object, list[_Found], set[str]]:
    """The messages without refused or ignored fields, the problems, and the ignored fields.

    Raises:
        InvalidFields: a message has too many fields or parts.
    """
    if not isinstance(messages, list):
        return messages, [], set()
    turns: list[object] = []
    problems: list[_Found] = []
    ignored: set[str] = set()
    n_parts = 0
    for i, turn in enumerate(messages):
        if not isinstance(turn, dict):
            turns.append(turn)
            continue
        if len(turn) > f.MOST_FIELDS:
            text = f"has {len(turn):,} fields, at most {f.MOST_FIELDS} are read"
            raise InvalidFields(FieldProblem(f"messages[{i}]", "too_many", text))
        content = turn.get("content")
        if isinstance(content, list):
            n_parts += len(content)
            ignored |= {f"messages[].content[].{name}" for name in f.IGNORED_IN_PARTS if _any_has(content, name)}
        elif content is None and "content" in turn and turn.get("role") == "assistant":  # cut off, or a call
            turn = {**turn, "content": ""}
        if turn.keys().isdisjoint(_EXTRA):
            turns.append(turn)
            continue
        if len(problems) < MOST_COUNTED:
            problems += _refused(turn, f.REFUSED_IN_MESSAGES, f"messages[{i}].")
        ignored |= {f"messages[].{name}" for name in f.IGNORED_IN_MESSAGES if turn.get(name) is not None}
        turns.append(_without(turn, f.REFUSED_IN_MESSAGES, f.IGNORED_IN_MESSAGES))
    if n_parts > f.MOST_PARTS:
        text = f"have {n_parts:,} parts of content, at most {f.MOST_PARTS:,} are read"
        raise InvalidFields(FieldProblem("messages", "too_many", text))
    return turns, problems, ignored


def _any_has(parts: list[object], name: str) -> bool:
    return any(isinstance(part, dict) and part.get(name) is not None for part in parts)


def _validate(
    body: dict[str, Any], model: type[_ModelT], refused: Mapping[str, f.Neutral], ignored: Collection[str]
) -> tuple[_ModelT | None, list[_Found], set[str]]:
    """The used fields, the problems of the body, and the names of the ignored fields."""
    if body.get("temperature") in (None, 0):
        ignored = {*ignored, *(name for name in f.OF_SAMPLING if isinstance(body.get(name), int | float))}
    refused = {name: refused[name] for name in refused if name not in ignored}
    problems = list(_refused(body, refused))
    given = {name for name in ignored if body.get(name) is not None and body[name] not in f.OF_ENGINES.get(name, ())}
    known = (*model.model_fields, *refused, *ignored)
    try:
        fields = model.model_validate(_without(body, refused, ignored))
    except ValidationError as error:
        details = _details(error, body.get("messages"))
        return None, [*(partial(_problem, detail, model, known) for detail in details), *problems], given
    if fields.stream_options is not None:
        if not fields.stream:
            alone = FieldProblem("stream_options", "invalid_value", 'only goes with "stream": true')
            problems.append(lambda _: alone)
        given |= {
            f"stream_options.{name}"
            for name in ("continuous_usage_stats", "include_obfuscation")
            if getattr(fields.stream_options, name)
        }
    return fields, problems, given


def _details(error: ValidationError, messages: object) -> list[ErrorDetails]:
    """The errors of a body. Validation stops at the first wrong element of a list; later messages are checked here."""
    details = error.errors(include_url=False)
    at = [i for i, detail in enumerate(details) if detail["loc"][:1] == ("messages",) and len(detail["loc"]) > 1]
    if at and isinstance(messages, list):
        wrong = details[at[0]]["loc"][1]
        assert isinstance(wrong, int)
        details[at[-1] + 1 : at[-1] + 1] = islice(_later(messages, wrong + 1), MOST_COUNTED)
    return details


def _later(messages: Sequence[object], start: int) -> Iterator[ErrorDetails]:
    for i in range(start, len(messages)):
        try:
            f.Turn.model_validate(messages[i])
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                yield {**detail, "loc": ("messages", i, *detail["loc"])}


def _invalid(found: Sequence[_Found]) -> InvalidFields:
    """The error of at least one problem. Only those that it lists are described: there may be very many."""
    listed = [describe(i < MOST_SUGGESTED) for i, describe in enumerate(found[:MOST_PROBLEMS])]
    return InvalidFields(*listed, more=min(len(found), MOST_COUNTED) - len(listed))


def _unknown_expert(experts: Collection[str], param: str, name: str, suggest: bool) -> FieldProblem:
    close = did_you_mean(name, experts) if suggest else ""
    return FieldProblem(param, "unknown_expert", f"{_cut(name)!r} is not registered{close}")


def _without(body: Mapping[str, Any], refused: Collection[str], ignored: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in refused and name not in ignored}


def _refused(body: Mapping[str, Any], refused: Mapping[str, f.Neutral], place: str = "") -> Iterator[_Found]:
    for name, neutral in refused.items():
        if name in body and not f.is_neutral(body[name], neutral):
            yield partial(_unsupported, place + name, body[name], neutral)


def _unsupported(param: str, value: object, neutral: f.Neutral, suggest: bool) -> FieldProblem:
    only = f", only {_shown(neutral[1])}" if len(neutral) > 1 else ": leave it out"
    return FieldProblem(param, "unsupported_parameter", f"{_shown(value)} is not supported here{only}")


def _problem(detail: ErrorDetails, model: type[BaseModel], known: Collection[str], suggest: bool) -> FieldProblem:
    """A pydantic error for a client: the field, the expected and the given value."""
    kind, loc = detail["type"], detail["loc"]
    if kind == "string_unicode":
        return FieldProblem(dotted(loc) or "body", "invalid_value", f"holds no text: {_shown(detail['input'])}")
    param = dotted(tuple(_cut(name) if isinstance(name, str) else name for name in loc))
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "missing":
        return FieldProblem(param, code, "is required")
    if kind in ("too_short", "string_too_short"):
        return FieldProblem(param, code, "must not be empty")
    if kind == "extra_forbidden":
        close = did_you_mean(str(loc[-1]), _names(model, loc, known)) if suggest else ""
        return FieldProblem(param, code, f"is not a known field{close}")
    expected = "should be an object" if kind in ("model_type", "dict_type") else detail["msg"].removeprefix("Input ")
    got = "" if kind in ("unsupported_value", "unicode", "too_many") else f", got {_shown(detail['input'])}"
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
    pieces, length = [], 0
    for piece in json.JSONEncoder(default=repr).iterencode(value[:MOST_SHOWN] if isinstance(value, str) else value):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_SHOWN:  # the rest may be megabytes
            break
    text = "".join(pieces)
    cut = length > MOST_SHOWN or (isinstance(value, str) and len(value) > MOST_SHOWN)
    return text[: MOST_SHOWN - 3] + "..." if cut else text


def _cut(name: str) -> str:
    """A name of the client's, shortened, and without lone surrogates."""
    name = name if len(name) <= MOST_SHOWN else name[: MOST_SHOWN - 3] + "..."
    return name.encode("utf-8", "replace").decode()
