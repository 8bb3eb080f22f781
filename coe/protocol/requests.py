"""OpenAI's requests: parses a JSON body into requests and queries, or reports every problem at once.

Bodies are hostile: elements are counted before they are validated, and few problems are described (`problems`).

An absent `temperature` is 0, not OpenAI's 1: answers are greedy and repeatable unless sampling is requested.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from coe.errors import InvalidRequest
from coe.protocol import bounds
from coe.protocol import fields as f
from coe.protocol.consistency import chat_problems, completion_problems, weight_problems
from coe.protocol.errors import MOST_COUNTED, FieldProblem, InvalidFields
from coe.protocol.messages import Turn
from coe.protocol.parsed import Parsed
from coe.protocol.problems import Found, invalid, problem, refused, shown, wrong
from coe.protocol.prompts import Prompt
from coe.protocol.tools import NamedChoice
from coe.protocol.turns import prepared_turns
from coe.sampling import NO_OPTIONS, SamplingOptions
from coe.types import GenerateRequest
from routers.base import Query

_REFUSED_IN_CHAT: Final = {**f.OF_ENGINES, "best_of": (None, 1), "echo": (None, False), **f.REFUSED_IN_CHAT}
_REFUSED_IN_COMPLETIONS: Final = {**f.OF_ENGINES, **f.REFUSED_IN_COMPLETIONS}
_IGNORED_IN_CHAT: Final = f.IGNORED_IN_CHAT | f.IGNORED_OF_ENGINES
_IGNORED_IN_COMPLETIONS: Final = f.IGNORED_IN_COMPLETIONS | f.IGNORED_OF_ENGINES
_OPTIONS: Final = frozenset(SamplingOptions.__dataclass_fields__)
_ModelT = TypeVar("_ModelT", bound=f.GenerateFields)


def parse_chat(body: object) -> Parsed:
    """The body of `/v1/chat/completions`.

    Raises:
        InvalidRequest: it is not an object, or its fields are wrong: every problem at once.
    """
    whole = request_object(body)
    messages, problems, ignored = prepared_turns(whole.get("messages"))
    given = {**whole, "messages": messages} if "messages" in whole else whole
    chat, more, also = _validate(given, f.ChatFields, _REFUSED_IN_CHAT, _IGNORED_IN_CHAT)
    if chat is not None:
        more += chat_problems(chat)
    if chat is None or problems or more:
        raise invalid([*more, *problems])
    conversation = tuple(turn.message for turn in chat.messages)
    if any(message.parts for message in conversation) and (more := list(weight_problems(conversation))):
        raise invalid(more)
    limit = chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
    request = GenerateRequest(messages=conversation, **_sampling(chat, limit), **_chat_options(chat))
    if not request.tools and chat.parallel_tool_calls is not None:
        also.add("parallel_tool_calls")
    return _parsed(chat, [request], ignored | also)


def parse_completion(body: object) -> Parsed:
    """The body of `/v1/completions`.

    Raises:
        InvalidRequest: it is not an object, or its fields are wrong: every problem at once.
    """
    completion, problems, ignored = _validate(
        request_object(body), f.CompletionFields, _REFUSED_IN_COMPLETIONS, _IGNORED_IN_COMPLETIONS
    )
    if completion is not None:
        problems += completion_problems(completion)
    if completion is None or problems:
        raise invalid(problems)
    options = _sampling(completion, completion.max_tokens) | {
        "echo": bool(completion.echo),
        "logprobs": completion.logprobs,
        "prompt_logprobs": completion.logprobs if completion.echo else None,
    }
    return _parsed(completion, [_continued(prompt, options) for prompt in completion.prompt], ignored)


def request_object(body: object, *, measured: bool = True) -> dict[str, Any]:
    """The object of a request. Raises InvalidRequest if it is none, or exceeds a bound (`coe.protocol.bounds`).

    Args:
        measured: bytes count, too; otherwise only elements.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object with the fields of a request, got {shown(body)}")
    for exceeded, code in ((bounds.too_many, "too_many"), (bounds.too_large, "too_large"))[: 1 + measured]:
        problems = [FieldProblem(".".join(place) or "body", code, text) for place, text in exceeded(body)]
        if problems:
            raise InvalidFields(*problems)
    return body


def _sampling(fields: f.GenerateFields, max_tokens: int | None) -> dict[str, Any]:
    return {
        "max_tokens": max_tokens,
        "temperature": fields.temperature or 0.0,
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "stop": tuple(fields.stop or ()),
        "seed": fields.seed,
        "deadline_s": fields.coe.deadline_s if fields.coe else None,
        "priority": fields.coe.priority if fields.coe else None,
        "stream": bool(fields.stream),
        "sampling": _options(fields),
    }


def _options(fields: f.GenerateFields) -> SamplingOptions:
    if fields.model_fields_set.isdisjoint(_OPTIONS):
        return NO_OPTIONS
    given = {name: getattr(fields, name) for name in _OPTIONS}
    given["top_k"] = max(given["top_k"] or 0, 0)  # -1 is all tokens, too
    given["logit_bias"] = {int(token): value for token, value in (given["logit_bias"] or {}).items()}
    without_effect = () if fields.temperature else f.OF_SAMPLING
    return SamplingOptions(
        **{name: value for name, value in given.items() if value is not None and name not in without_effect}
    )


def _chat_options(chat: f.ChatFields) -> dict[str, Any]:
    """The options of a chat request alone; few requests have any."""
    options: dict[str, Any] = {}
    if chat.response_format is not None and chat.response_format.type != "text":
        options |= {"format": "json", "json_schema": chat.response_format.document}
    if chat.tools:
        named = chat.tool_choice.function.name if isinstance(chat.tool_choice, NamedChoice) else None
        options |= {
            "tools": tuple(tool.document for tool in chat.tools),
            "tool_choice": "required" if named else chat.tool_choice or "auto",
            "tool_name": named,
            "parallel_tool_calls": chat.parallel_tool_calls is not False,
        }
    if chat.logprobs:
        options["logprobs"] = chat.top_logprobs or 0
    if chat.reasoning_effort is not None:
        options["reasoning_effort"] = chat.reasoning_effort
    if chat.chat_template_kwargs:
        options["template_kwargs"] = chat.chat_template_kwargs
    return options


def _continued(prompt: Prompt, options: Mapping[str, Any]) -> GenerateRequest:
    if isinstance(prompt, str):
        return GenerateRequest(prompt=prompt, **options)
    return GenerateRequest(prompt="", prompt_ids=prompt, **options)


def _parsed(fields: f.GenerateFields, requests: Sequence[GenerateRequest], ignored: set[str]) -> Parsed:
    own = fields.coe or f.Extension()
    request = requests[0]
    query = Query(
        request.read,
        tools=request.offered,
        format=request.format,
        needs=request.needs,
        allowed=None if own.experts is None else frozenset(own.experts),
        cost_weight=own.cost_weight,
        seed=own.seed,
        max_tokens=request.max_tokens,
        raw=request.prompt is not None,
        previous=own.session.expert if own.session else None,
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
        n=fields.n or 1,
        others=tuple(requests[1:]),
    )


def _validate(
    body: dict[str, Any], model: type[_ModelT], unsupported: Mapping[str, f.Neutral], ignored: frozenset[str]
) -> tuple[_ModelT | None, list[Found], set[str]]:
    """The used fields, the problems of the body, and the names of the ignored fields."""
    problems = list(refused(body, unsupported))
    given: set[str] = {
        name for name in ignored & body.keys() if body[name] not in (None, *f.IGNORED_VALUES.get(name, ()))
    }
    if not body.get("temperature"):
        given |= {name for name in f.OF_SAMPLING & body.keys() if body[name] not in (None, -1, 0)}
    try:
        fields = model.model_validate(_without(body, unsupported, ignored))
    except ValidationError as error:
        known = (*model.model_fields, *unsupported, *ignored)
        details = all_details(error, "messages", body.get("messages"), Turn.model_validate)
        return None, [*(partial(problem, detail, model, known) for detail in details), *problems], given
    if fields.stream_options is not None:
        if not fields.stream:
            problems.append(wrong("stream_options", 'only goes with "stream": true'))
        given |= {
            f"stream_options.{name}"
            for name in ("continuous_usage_stats", "include_obfuscation")
            if getattr(fields.stream_options, name)
        }
    return fields, problems, given


def all_details(
    error: ValidationError, name: str, elements: object, validate: Callable[[object], object]
) -> list[ErrorDetails]:
    """The errors of a body. Validation stops at the first wrong element of a list; its later ones are checked here.

    Args:
        name: of the list. elements: its value, whatever that is. validate: for one element.
    """
    details = error.errors(include_url=False)
    at = [i for i, detail in enumerate(details) if detail["loc"][:1] == (name,) and len(detail["loc"]) > 1]
    if at and isinstance(elements, list):
        first = details[at[0]]["loc"][1]
        assert isinstance(first, int)
        details[at[-1] + 1 : at[-1] + 1] = islice(_later(name, elements, first + 1, validate), MOST_COUNTED)
    return details


def _later(
    name: str, elements: Sequence[object], start: int, validate: Callable[[object], object]
) -> Iterator[ErrorDetails]:
    for i in range(start, len(elements)):
        try:
            validate(elements[i])
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                yield {**detail, "loc": (name, i, *detail["loc"])}


def _without(body: Mapping[str, Any], unsupported: Collection[str], ignored: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in unsupported and name not in ignored}
