"""Rows of the input: OpenAI batch lines, or plain rows. They are parsed as the endpoint parses a request.

OpenAI:  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
plain:   {"id": "a", "prompt": "...", "max_tokens": 20}      one user message; or "messages", as in a chat request

A row without an id gets its line number, `line-0000000012`: these ids sort as the input does. Whole numbers may be
written as floats, and missing fields as NaN, as data frames write them (`coe.protocol.table_values`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from coe.batch.source import RawRow
from coe.errors import CoeError, InvalidRequest
from coe.protocol.parsed import Parsed
from coe.protocol.requests import parse_chat, parse_completion
from coe.protocol.table_values import given, kind_of, text_id
from coe.types import GenerateRequest
from registry.json_text import LongNumber, loads
from routers.base import Query

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PARSERS: Final[Mapping[str, Callable[[dict[str, Any]], Parsed]]] = {CHAT: parse_chat, COMPLETIONS: parse_completion}
_BATCH_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_MOST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row of the input: a request, or an error.

    Attributes:
        model: as in a request: `auto`, `coe/<policy>`, or an expert's name.
        endpoint: of an OpenAI batch line; None for a plain row.
        ignored: fields of the row that have no effect.
        answers: whether its result has every expert's answer.
    """

    line: int
    id: str
    model: str
    endpoint: str | None = None
    request: GenerateRequest | None = None
    query: Query | None = None
    ignored: tuple[str, ...] = ()
    answers: bool = False
    error: CoeError | None = None


def parse_row(line: RawRow, default_model: str, experts: Collection[str], *, others: bool = False) -> InputRow:
    """The row of a line. Never raises: `error` has the problem, with the line's number.

    Args:
        experts: those that may answer it, for `coe.experts` and `coe.exclude` of a row.
        others: there are other experts, which may not.
    """
    row = InputRow(line.number, f"line-{line.number:010d}", default_model)
    try:
        fields = _fields(line.content)
        batch_line = "custom_id" in fields or "body" in fields
        row = replace(row, id=_id(fields.get("custom_id" if batch_line else "id"), row.id))
        endpoint, body = _batch_body(fields) if batch_line else (None, _plain_body(fields))
        row = replace(row, endpoint=endpoint, model=_model(body, default_model))
        parsed = _PARSERS[endpoint or CHAT]({**body, "model": row.model})
        _check_whole(parsed)
        # No client waits for one row: a deadline would only make the results depend on the machine.
        asked = parsed.request
        request = replace(asked, stream=False, seed=_seed(asked, row.id), deadline_s=None)
        ignored = (*parsed.ignored, *(("coe.deadline_s",) if asked.deadline_s is not None else ()))
        query = parsed.query_among(experts, others=others)
        return replace(row, request=request, query=query, ignored=ignored, answers=parsed.answers)
    except CoeError as error:
        return replace(row, error=_placed(error, line.number))


def _check_whole(parsed: Parsed) -> None:
    """A row has one answer, and it is whole."""
    if parsed.stream:
        raise InvalidRequest("stream: a batch writes whole answers; leave it out")
    if parsed.n > 1:
        raise InvalidRequest(f"n: {parsed.n} is not supported in a batch, only 1: repeat the row with other seeds")
    if parsed.others:
        raise InvalidRequest("prompt: several prompts are not supported in a batch: give each prompt a row of its own")


def _fields(content: bytes | dict[str, Any]) -> dict[str, Any]:
    """The fields of a row; Parquet has nulls for absent ones."""
    if isinstance(content, dict):
        return given(content, nulls=True)
    if len(content) > _MOST_BYTES:
        raise InvalidRequest(f"has {len(content):,} bytes; a row may have {_MOST_BYTES:,}")
    try:
        value = loads(content)
        if b"\\ud" in content.lower():  # half of a surrogate pair is JSON, but cannot be written as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"is not Unicode text: {error.reason}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except LongNumber as error:
        raise InvalidRequest(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"is not a JSON object but {kind_of(value)}")
    return {key: inner for key, inner in given(value, nulls=False).items() if inner is not None}


def _id(value: object, otherwise: str) -> str:
    try:
        return text_id(value) or otherwise
    except ValueError as error:
        raise InvalidRequest(f"id (custom_id) {error}") from error


def _batch_body(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Endpoint and body of an OpenAI batch line."""
    unknown = sorted(fields.keys() - _BATCH_FIELDS)
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0]!r}: a batch line has {', '.join(sorted(_BATCH_FIELDS))}")
    if fields.get("method", "POST") != "POST":
        raise InvalidRequest(f"method must be 'POST', got {fields['method']!r}")
    url = fields.get("url")
    if not isinstance(url, str) or url not in _PARSERS:
        raise InvalidRequest(f"url must be one of {', '.join(_PARSERS)}, got {url!r}")
    body = fields.get("body")
    if isinstance(body, str):  # Parquet without nested columns
        body = _fields(body.encode())
    if not isinstance(body, dict):
        raise InvalidRequest(f"body must be an object, got {kind_of(body)}")
    return url, body


def _plain_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request: `prompt` is one user message."""
    body = {key: value for key, value in fields.items() if key not in ("id", "prompt")}
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest("give either prompt or messages, not both and not neither")
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise InvalidRequest(f"prompt must be a string, got {kind_of(fields['prompt'])}")
        body["messages"] = [{"role": "user", "content": fields["prompt"]}]
    return body


def _model(body: Mapping[str, Any], default: str) -> str:
    model = body.get("model", default)
    if not isinstance(model, str):
        raise InvalidRequest(f"model must be a string, got {kind_of(model)}")
    return model


def _seed(request: GenerateRequest, row_id: str) -> int | None:
    """A seed for a sampled answer, so that a resumed run writes the same as an uninterrupted one."""
    if request.seed is not None or not request.temperature:
        return request.seed
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big")


def _placed(error: CoeError, line: int) -> CoeError:
    """The same error, with the line in its message."""
    error.args = (f"line {line}: {error}",)
    return error
