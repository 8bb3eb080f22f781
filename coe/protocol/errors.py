"""Errors in OpenAI's form: an HTTP status, and a body with message, type, param and code.

InvalidRequest
├── InvalidFields      fields of a request are invalid; lists every problem, `.param` is the first field
└── RequestTooLarge    the body exceeds the limit
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from coe.errors import (
    Abstained,
    CoeError,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    Overloaded,
    UnknownModel,
    WeightsError,
)
from registry.errors import RegistryError, UnknownExpert
from routers.constraints import CONTEXT_LENGTH
from routers.errors import NoEligibleExpert, RouterError

INVALID, RATE, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One problem of a request. `param` is its place, such as `messages[0].role`; `code` an OpenAI-style code."""

    param: str
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.param}: {self.message}"


class InvalidFields(InvalidRequest):
    """Fields of a request are invalid. The message lists every problem; `param` and `code` are those of the first."""

    def __init__(self, *problems: FieldProblem) -> None:
        self.problems = problems
        self.param, self.code = problems[0].param, problems[0].code
        many = f"{len(problems)} problems:\n" if len(problems) > 1 else ""
        super().__init__(many + "\n".join(map(str, problems)))

    def __reduce__(self) -> tuple[type[InvalidFields], tuple[FieldProblem, ...]]:
        return InvalidFields, self.problems


class RequestTooLarge(InvalidRequest, status=413, code="request_too_large"):
    """The body exceeds the limit."""


_OUTSIDE: Final[Mapping[type[Exception], tuple[int, str]]] = {
    NoEligibleExpert: (400, "no_eligible_expert"),
    RouterError: (500, "router_error"),
    UnknownExpert: (404, "model_not_found"),
    RegistryError: (500, "registry_error"),
}
"""Status and code of errors without their own; the first match counts."""
_PUBLIC: Final = (Abstained, InvalidRequest, EngineError, Overloaded, DeadlineExceeded, NoEligibleExpert, UnknownExpert)
_INTERNAL: Final = (WeightsError,)
"""Public errors whose message names files of the server."""


def error_body(error: BaseException, *, logged_as: str | None = None) -> tuple[int, dict[str, Any]]:
    """The HTTP status of an error, and OpenAI's body for it.

    Args:
        error: any exception.
        logged_as: id under which the error is logged. If given, the message of an internal error names only this id,
            so that details stay on the server; otherwise every message is the error's own.
    """
    status, code = _status(error)
    message = str(error) or type(error).__name__
    if logged_as is not None and isinstance(error, UnknownModel | UnknownExpert):  # the reader is a client
        message += (" " if message.endswith("?") else "; ") + "GET /v1/models lists all"
    if is_internal(error) and logged_as is not None:
        message = f"the server failed on this request; the cause is logged under the id {logged_as}"
    return status, body_of(message, type_of(status), code, getattr(error, "param", None))


def type_of(status: int) -> str:
    """OpenAI's `type` of an error with that HTTP status."""
    return RATE if status == 429 else SERVER if status >= 500 else INVALID


def body_of(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's body of an error; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_internal(error: BaseException) -> bool:
    """Whether the message of an error belongs in the log only."""
    return not isinstance(error, _PUBLIC) or isinstance(error, _INTERNAL)


def retry_after_s(error: BaseException) -> int | None:
    """Whole seconds after which to retry: at least 1 for 429 and 503, otherwise None."""
    if not isinstance(error, CoeError) or error.status not in (429, 503):
        return None
    return max(1, math.ceil(getattr(error, "retry_after_s", 1)))


def _status(error: BaseException) -> tuple[int, str]:
    if isinstance(error, CoeError):
        return error.status, error.code
    if isinstance(error, NoEligibleExpert) and CONTEXT_LENGTH in error.constraints:
        return 400, "context_length_exceeded"  # a shorter prompt would leave an expert
    return next((told for cls, told in _OUTSIDE.items() if isinstance(error, cls)), (500, "internal_error"))
