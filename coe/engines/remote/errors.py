"""Translates failures of an endpoint into this project's errors, and decides which are transient.

The message of each error is for operators: the endpoint and its own words, without secrets. Clients get a short text
that names neither the endpoint's URL nor, except for a rejected request, its words (`CoeError.public`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

from coe.engines.remote.answer import EndpointFailure, OnlyReasoning, StreamCut
from coe.engines.remote.events import MalformedStream
from coe.engines.remote.redaction import for_clients, for_log, redacted
from coe.errors import CoeError, Rejected, RemoteError
from registry.spec import ExpertSpec

_LONGEST_STATED_S: Final = 3600.0
_PASSING_STATUSES: Final = frozenset({408, 409, 425, 429})
_REJECTED: Final = frozenset({400, 413, 422})
"""The endpoint rejects this request: another expert may take it."""
_NO_MONEY: Final = frozenset(
    {"insufficient_quota", "insufficient_balance", "billing_not_active", "billing_hard_limit_reached"}
)
_CODES: Final = frozenset({"context_length_exceeded", "content_filter", "content_policy_violation"})
"""Codes of rejections that clients know, which are passed on."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed shortly after."""
    import openai

    if isinstance(error, openai.APIStatusError | EndpointFailure):
        status = error.status_code if isinstance(error, openai.APIStatusError) else error.status or 500
        return (status in _PASSING_STATUSES or status >= 500) and error.code not in _NO_MONEY
    if isinstance(error, openai.APIResponseValidationError):
        return False
    return isinstance(error, openai.APIError | StreamCut) or (isinstance(error, RemoteError) and error.retryable)


def stated_wait_s(error: BaseException) -> float | None:
    """The Retry-After of an endpoint, from 0 to 3,600 seconds; None if it states none."""
    value: str | None = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):  # neither seconds nor a date
            return None
    return min(max(seconds, 0.0), _LONGEST_STATED_S) if math.isfinite(seconds) else None


@contextmanager
def translate(spec: ExpertSpec, *, shown: bool, secrets: Collection[str] = ()) -> Iterator[None]:
    """Raise this project's errors for those of the client.

    Args:
        spec: the remote expert.
        shown: whether text was already streamed; for the message.
        secrets: texts that no message may contain.
    """
    import openai

    failures = (openai.OpenAIError, openai.InvalidWebhookSignatureError, ValueError)
    try:
        yield
    except CoeError:
        raise
    except (*failures, MalformedStream, OnlyReasoning, StreamCut, EndpointFailure) as error:
        raise translated(error, spec, shown=shown, secrets=secrets) from error


def translated(
    error: Exception, spec: ExpertSpec, *, shown: bool = False, secrets: Collection[str] = ()
) -> RemoteError | Rejected:
    """The error for one of the client's, with what the user can do. Removes secrets from `error`, its cause, too."""
    import openai

    _redact(error, secrets)
    where, when = f"{spec.name!r} ({spec.source})", " in the middle of its answer" if shown else ""
    endpoint = f"the endpoint of {spec.name!r}"
    retryable = is_transient(error)
    match error:
        case openai.APIStatusError():
            return _refused(error, spec, error.status_code, _words(error), error.code, secrets)
        case EndpointFailure() if error.status in (*_REJECTED, 429):
            return _refused(error, spec, error.status or 0, error.message, error.code, secrets)
        case EndpointFailure():
            text, public = f"failed{when}: APIError: {for_log(error.message, secrets)}", "reported an error"
        case openai.APITimeoutError():
            text = public = f"timed out{when}"
        case openai.APIConnectionError():
            public = f"cannot be reached, or closed the connection{when}"
            text = f"{public}: {for_log(str(error.__cause__ or error), secrets)}"
        case OnlyReasoning():
            reason = "spent max_tokens on reasoning and gave no answer: raise max_tokens"
            return Rejected(f"{where} {reason}", public=f"{spec.name!r} {reason}")
        case StreamCut():
            text = public = "closed the stream before its end"
        case MalformedStream():
            text = public = f"failed{when}: the answer cannot be used: {error}"
        case _:
            text = f"failed{when}: {type(error).__name__}: {for_log(str(error), secrets)}"
            public = f"failed{when}"
    return RemoteError(f"{where} {text}", retryable=retryable, public=f"{endpoint} {public}")


def _refused(
    error: Exception, spec: ExpertSpec, status: int, message: str, code: str | None, secrets: Collection[str]
) -> RemoteError | Rejected:
    """The error for an HTTP status."""
    where, said = f"{spec.name!r} ({spec.source})", for_log(message, secrets) or "without a reason"
    if status in _REJECTED and code not in _NO_MONEY:
        how = " as too large" if status == 413 else ""
        reason = for_clients(message, secrets)
        return Rejected(
            f"{where} rejects the request{how}: {said}",
            status=413 if status == 413 else 400,
            code=code if code in _CODES else None,
            public=f"{spec.name!r} rejects the request{how}" + (f": {reason}" if reason else ""),
        )
    wait_s = stated_wait_s(error)
    text, public = _explained(error, spec, status, code)
    passed_on = (status == 429 and code not in _NO_MONEY) or (status == 503 and wait_s is not None)
    return RemoteError(
        f"{where} {text}: {said}",
        retryable=is_transient(error),
        status=status if passed_on else None,
        retry_after_s=wait_s,
        public=f"the endpoint of {spec.name!r} {public}",
    )


def _explained(error: Exception, spec: ExpertSpec, status: int, code: str | None) -> tuple[str, str]:
    """What a status means, for operators and for clients."""
    if status == 402 or code in _NO_MONEY:
        return f"returned HTTP status {status}, the account has no credit left", "has no credit left"
    if status in (401, 403):
        key = f"the key in {spec.api_key_env}" if spec.api_key_env else "requests without a key; set its api_key_env"
        return f"rejects {key}", "rejects the key of this service"
    if status == 404:
        unknown = f"does not know the model {spec.model or spec.name!r}, or has no such path"
        return unknown, "does not know its model"
    if 300 <= status < 400:
        return f"redirects to {_target(error)}, which is not followed: register that URL", "redirects elsewhere"
    if status == 429:
        return f"returned HTTP status {status}", "accepts no more requests now"
    return f"returned HTTP status {status}", f"returned HTTP status {status}"


def _words(error: Any) -> str:
    """The endpoint's own message, in the forms of OpenAI and other servers, or its body if it has none."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        words = (body.get(name) for name in ("message", "detail", "error"))
        return next((text for text in words if isinstance(text, str)), json.dumps(body))
    return body if isinstance(body, str) else ""


def _target(error: Exception) -> str:
    """Where a redirect leads, without user and query."""
    location = getattr(getattr(error, "response", None), "headers", {}).get("location", "")
    try:
        parts = urlsplit(location)
        return for_log(f"{parts.scheme}://{parts.hostname}{parts.path}" if parts.hostname else parts.path, ())
    except ValueError:
        return "an invalid URL"


def _redact(error: Exception, secrets: Collection[str]) -> None:
    """Remove secrets from the client's exception: tracebacks in logs show its message."""
    told: Any = error
    if isinstance(getattr(error, "message", None), str):
        told.message = redacted(told.message, secrets)
    error.args = tuple(redacted(each, secrets) if isinstance(each, str) else each for each in error.args)
