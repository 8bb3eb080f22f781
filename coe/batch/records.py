"""Requests, decisions, answers and errors as columns of part files, and back."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

import coe.errors
from coe.batch.pieces import PIECES, pieces_of, pieces_record
from coe.errors import CoeError, EngineError, InvalidRequest
from coe.protocol.decision import decision_document, decision_from
from coe.protocol.errors import error_body, is_internal
from coe.seam import text_of
from coe.types import Answer, Failure, GenerateRequest, Usage
from routers.base import RoutingDecision

ROWS = pa.schema(
    [
        ("line", pa.int64()),
        ("id", pa.string()),
        ("model", pa.string()),
        ("endpoint", pa.string()),
        ("request", pa.string()),
        ("policy", pa.string()),
        ("fallback", pa.string()),
        ("barred", pa.string()),
        ("answers", pa.bool_()),
        ("decision", pa.string()),
        ("error", pa.string()),
    ]
)
"""A part of the input, routed."""

CALLS = pa.schema(
    [
        ("row", pa.int32()),
        ("call", pa.string()),
        ("expert", pa.string()),
        ("request", pa.string()),
        ("wants", pa.string()),
    ]
)
"""Calls of one stage; `row` is the position in the part."""

OUTCOME = [
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("usage_estimated", pa.bool_()),
    ("cost_usd", pa.float64()),
]
"""Columns of an answer beside its text."""

ANSWERS = pa.schema(
    [
        ("row", pa.int32()),
        ("call", pa.string()),
        ("expert", pa.string()),
        ("text", pa.string()),
        *PIECES,
        *OUTCOME,
        ("value", pa.binary()),
        ("notes", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
"""Answers to the calls; `error` where a call failed."""
_REQUEST = TypeAdapter(GenerateRequest)
logger = logging.getLogger(__name__)
_ERROR_FIELDS = ("status", "code", "retryable")
_OWN_FIELDS = ("public", "retry_after_s")
"""Fields that few errors have."""
_NUMBERS = ("expert", "prompt_tokens", "max_tokens", "context_length")
"""Fields of a ContextLengthExceeded, by which a composition shortens its next call."""


@dataclass(frozen=True, slots=True)
class RoutedRow:
    """A row of the input with its decision: everything that its composition needs.

    Attributes:
        policy, fallback: names; None where the caller named the expert, or no fallback may answer.
        barred: experts that the composition names and the request excludes, with the reasons (`coe.compose.Without`).
        answers: whether the result has every expert's answer.
        error: an OpenAI error with its HTTP status, for a row without a decision.
    """

    line: int
    id: str
    model: str
    endpoint: str | None = None
    request: GenerateRequest | None = None
    policy: str | None = None
    fallback: str | None = None
    barred: Mapping[str, str] | None = None
    answers: bool = False
    decision: RoutingDecision | None = None
    error: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """As a row of `ROWS`."""
        return {
            "line": self.line,
            "id": self.id,
            "model": self.model,
            "endpoint": self.endpoint,
            "request": self.request and dump_request(self.request),
            "policy": self.policy,
            "fallback": self.fallback,
            "barred": self.barred and _dump(self.barred),
            "answers": self.answers,
            "decision": self.decision and _dump(decision_document(self.decision)),
            "error": self.error and _dump(self.error),
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RoutedRow:
        """The row of a record."""
        return cls(
            **{
                **record,
                "request": record["request"] and load_request(record["request"]),
                "barred": record["barred"] and json.loads(record["barred"]),
                "decision": record["decision"] and decision_from(json.loads(record["decision"])),
                "error": record["error"] and json.loads(record["error"]),
            }
        )


def dump_request(request: GenerateRequest) -> str:
    """As JSON, without the fields that have their default.

    The deadline, which a composition may set, is left out too: in a batch no client waits for one answer, and results
    must not depend on the machine.
    """
    return _REQUEST.dump_json(request, exclude_defaults=True, exclude={"deadline_s"}).decode()


def load_request(text: str) -> GenerateRequest:
    """The inverse of `dump_request`."""
    return _REQUEST.validate_json(text)


def dump_outcome(row: int, call: str, outcome: Answer | Failure) -> dict[str, Any]:
    """As a row of `ANSWERS`."""
    record = dict.fromkeys(ANSWERS.names, None) | {"row": row, "call": call, "expert": outcome.expert}
    if isinstance(outcome, Failure):
        return record | {"error": _dump(_dump_error(outcome.error))}
    said = {"text": outcome.text, "value": outcome.value, "notes": list(outcome.notes), **pieces_record(outcome)}
    return record | said | outcome_columns(outcome)


def outcome_columns(answer: Answer) -> dict[str, Any]:
    """The columns `OUTCOME` of an answer."""
    usage = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
    marks = {"usage_estimated": answer.usage.estimated, "cost_usd": answer.cost_usd}
    return {"finish_reason": answer.finish_reason, **marks, **usage}


def load_outcome(record: Mapping[str, Any]) -> Answer | Failure:
    """The inverse of `dump_outcome`: an error has the same class and message."""
    if record["error"] is not None:
        return Failure(record["expert"], _load_error(json.loads(record["error"])))
    usage = usage_of(record)
    return Answer(
        record["expert"],
        record["text"],
        record["finish_reason"],
        usage,
        record["cost_usd"],
        notes=tuple(record["notes"] or ()),
        value=record["value"],
        **pieces_of(record),
    )


def usage_of(record: Mapping[str, Any]) -> Usage:
    """The usage in the columns `OUTCOME`."""
    return Usage(record["prompt_tokens"], record["completion_tokens"], estimated=bool(record.get("usage_estimated")))


def describe(error: Exception, logged_as: str | None = None) -> dict[str, Any]:
    """An OpenAI error object, and the HTTP status that the endpoint would send with it.

    Args:
        logged_as: id under which an internal error is logged; then clients read the results, and get no detail of it.
    """
    if logged_as is not None and is_internal(error):
        logger.warning("a row of %s failed: %s", logged_as, text_of(error))
    status, body = error_body(error, logged_as=logged_as)
    return {"status": status, **body["error"]}


def duplicate_id(row_id: str, line: int, first_line: int) -> dict[str, Any]:
    """The error of a row whose id is that of an earlier one."""
    error = InvalidRequest(f"line {line}: the id {row_id!r} is that of line {first_line} already")
    return describe(error) | {"code": "duplicate_id"}


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values. (`asdict` breaks a Counter.)"""
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    return {name: dict(each) if isinstance(each, Counter) else each for name, each in given.items()}


def _dump_error(error: Exception) -> dict[str, Any]:
    """Its class, or the one of `coe.errors` that it derives from, its message and fields."""
    kinds = (kind.__name__ for kind in type(error).__mro__ if vars(coe.errors).get(kind.__name__) is kind)
    ours = error if isinstance(error, CoeError) else EngineError(str(error))
    kept = {name: getattr(ours, name) for name in (*_ERROR_FIELDS, *_NUMBERS) if hasattr(ours, name)}
    kept |= {name: vars(ours)[name] for name in _OWN_FIELDS if name in vars(ours)}
    return {"type": next(kinds, "EngineError"), "message": str(error), **kept}


def _load_error(kept: Mapping[str, Any]) -> CoeError:
    kind = getattr(coe.errors, kept["type"])
    error: CoeError = kind.__new__(kind)  # its constructor may need arguments that only the message has by now
    error.args = (kept["message"],)
    for name in kept.keys() - {"type", "message"}:
        setattr(error, name, kept[name])
    return error


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
