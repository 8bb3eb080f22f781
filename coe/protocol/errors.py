"""Errors in OpenAI's form: an HTTP status, and a body with message, type, param and code.

InvalidRequest
├── InvalidFields      fields of a request are invalid; lists every problem, `.param` is the first field
└── RequestTooLarge    the body exceeds the limit
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from coe.errors import CoeError, ExpertDrained, InvalidRequest, UnknownModel
from coe.seam import text_of, visible
from registry.errors import RegistryError, UnknownExpert
from routers.constraints import CONTEXT_LENGTH, DRAINED
from routers.errors import NoEligibleExpert, RouterError

MOST_COUNTED: Final = 200
"""Problems of a request after which counting stops."""
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
    """Fields of a request are invalid. The message lists the problems; `param` and `code` are those of the first.

    Args:
        problems: at least one.
        more: number of problems that are not listed; together at most MOST_COUNTED are counted.
    """

    def __init__(self, *problems: FieldProblem, more: int = 0) -> None:
        self.problems, self.more = problems, more
        self.param, self.code = problems[0].param, problems[0].code
        count = len(problems) + more
        or_more = " or more" if count >= MOST_COUNTED else ""
        listed = f"{count} problems{or_more}, the first {len(problems)}:\n" if more else f"{count} problems:\n"
        super().__init__((listed if count > 1 else "") + "\n".join(map(str, problems)))

    def __reduce__(self) -> tuple[Any, tuple[FieldProblem, ...]]:
        return partial(InvalidFields, more=self.more), self.problems


class RequestTooLarge(InvalidRequest, status=413, code="request_too_large"):
    """The body exceeds the limit."""


_OUTSIDE: Final[Mapping[type[Exception], tuple[int, str]]] = {
    NoEligibleExpert: (400, "no_eligible_expert"),
    RouterError: (500, "router_error"),
    UnknownExpert: (404, "model_not_found"),
    RegistryError: (500, "registry_error"),
}
"""Status and code of errors without their own; the first match counts."""
_PUBLIC: Final = (NoEligibleExpert, UnknownExpert)
"""Errors of other packages whose message a client may read."""
TOO_LONG: Final = "context_length_exceeded"
CONTEXT_WORDS: Final = "This model's maximum context length is"
"""Words of OpenAI's by which clients such as LiteLLM and LangChain recognise a context error."""
LONGEST_RETRY_AFTER_S: Final = 3600
"""Clients are never asked to wait longer, whatever an endpoint states."""
MOST_CHARACTERS: Final = 8000
"""Most characters of a message in a body."""


def error_body(error: BaseException, *, logged_as: str | None = None) -> tuple[int, dict[str, Any]]:
    """The HTTP status of an error, and OpenAI's body for it.

    Args:
        error: any exception.
        logged_as: id under which the error is logged. If given, the reader is a client, who gets the error's public
            text (`CoeError.client_text`), or only this id if it has none. Otherwise the message is the error's own.
    """
    status, code = _status(error)
    message = _shown(error)
    if logged_as is not None:
        message = _for_clients(error, logged_as)
    if code == TOO_LONG and CONTEXT_WORDS not in message:
        message = f"{CONTEXT_WORDS} exceeded: {message}"
    return status, body_of(message, type_of(status), code, getattr(error, "param", None))


def _for_clients(error: BaseException, logged_as: str) -> str:
    text = _client_text(error)
    if text is None:
        return f"the server failed on this request; the cause is logged under the id {logged_as}"
    if isinstance(error, UnknownModel | UnknownExpert):
        return text + (" " if text.endswith("?") else "; ") + "GET /v1/models lists all"
    return f"{text}; details are logged under the id {logged_as}" if is_internal(error) else text


def _client_text(error: BaseException) -> str | None:
    if not isinstance(error, CoeError):
        return _shown(error) if isinstance(error, _PUBLIC) else None
    if error.internal and error.public is None:
        return None
    return visible(error.public) if error.public else _shown(error)


def _shown(error: BaseException) -> str:
    """The message with its lines, control characters escaped, or what can be read of it."""
    try:
        text = str(error)
    except Exception:  # `__str__` may be third-party code
        return text_of(error)
    return visible(text[:MOST_CHARACTERS]) or type(error).__name__


def type_of(status: int) -> str:
    """OpenAI's `type` of an error with that HTTP status."""
    return RATE if status == 429 else SERVER if status >= 500 else INVALID


def body_of(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's body of an error; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_internal(error: BaseException) -> bool:
    """Whether the log has more than the client may read: the error belongs there."""
    return _client_text(error) is None or (isinstance(error, CoeError) and error.public is not None)


def retry_after_s(error: BaseException) -> int | None:
    """Whole seconds after which to retry: 1 to LONGEST_RETRY_AFTER_S for 429 and 503, otherwise None."""
    if not isinstance(error, CoeError) or error.status not in (429, 503):
        return None
    seconds = 1.0 if error.retry_after_s is None else float(error.retry_after_s)
    return 1 if math.isnan(seconds) else math.ceil(min(max(seconds, 1), LONGEST_RETRY_AFTER_S))


def _status(error: BaseException) -> tuple[int, str]:
    if isinstance(error, CoeError):
        return error.status if error.status in range(400, 600) else 500, error.code
    if isinstance(error, NoEligibleExpert) and CONTEXT_LENGTH in error.constraints:
        return 400, TOO_LONG  # a shorter prompt would leave an expert
    if isinstance(error, NoEligibleExpert) and DRAINED in error.constraints:
        return ExpertDrained.status, ExpertDrained.code  # the same request may succeed later
    return next((told for cls, told in _OUTSIDE.items() if isinstance(error, cls)), (500, "internal_error"))
