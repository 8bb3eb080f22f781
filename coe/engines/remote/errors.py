"""Translates errors of the openai client into this project's, and decides which are transient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from coe.errors import CoeError, InvalidRequest, RemoteError
from registry.spec import ExpertSpec

_LONGEST_WAIT_S: Final = 60.0
_PASSING_STATUSES: Final = frozenset({408, 409, 425, 429})
_NO_MONEY: Final = "insufficient_quota"


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed shortly after."""
    import openai

    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        return (status in _PASSING_STATUSES or status >= 500) and error.code != _NO_MONEY
    if isinstance(error, openai.APIResponseValidationError):
        return False
    # An error event within a stream is a plain APIError: the server failed on a request that it had accepted.
    return isinstance(error, openai.APIError) or (isinstance(error, RemoteError) and error.retryable)


def seconds_to_retry(error: Exception) -> bool | float:
    """For stamina: whether to retry, or after how many seconds if the endpoint states it."""
    if not is_transient(error):
        return False
    response = getattr(error, "response", None)
    try:
        seconds = float(response.headers["retry-after"]) if response is not None else math.nan
    except (KeyError, ValueError):  # absent, or a date
        return True
    return min(max(seconds, 0.0), _LONGEST_WAIT_S) if math.isfinite(seconds) else True


@contextmanager
def translate(spec: ExpertSpec, *, shown: bool) -> Iterator[None]:
    """Raise this project's errors for those of the client.

    Args:
        spec: the remote expert.
        shown: whether text was already streamed; for the message.
    """
    import openai

    try:
        yield
    except CoeError:
        raise
    except (openai.OpenAIError, openai.InvalidWebhookSignatureError, ValueError) as error:
        raise translated(error, spec, shown=shown) from error


def translated(error: Exception, spec: ExpertSpec, *, shown: bool = False) -> CoeError:
    """The error for one of the client's, with what the user can do."""
    import openai

    where = f"{spec.name!r} ({spec.source})"
    when = " in the middle of its answer" if shown else ""
    retryable = is_transient(error)
    match error:
        case openai.APITimeoutError():
            text = f"{where} timed out{when}"
        case openai.APIConnectionError():
            text = f"{where} cannot be reached, or closed the connection{when}: {error.__cause__ or error}"
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            key = (
                f"the key in {spec.api_key_env}" if spec.api_key_env else "requests without a key; set its api_key_env"
            )
            text = f"{where} rejects {key}: {error.message}"
        case openai.NotFoundError():
            text = f"{where} does not know the model {spec.model or spec.name!r}, or has no such path: {error.message}"
        case openai.BadRequestError() | openai.UnprocessableEntityError():
            return InvalidRequest(f"{where} rejects the request: {error.message}")
        case openai.APIStatusError(status_code=413):
            return InvalidRequest(f"{where} rejects the request as too large: {error.message}")
        case openai.APIStatusError():
            text = f"{where} returned HTTP status {error.status_code}: {error.message}"
        case _:
            text = f"{where} failed{when}: {type(error).__name__}: {error}"
    return RemoteError(text, retryable=retryable)
