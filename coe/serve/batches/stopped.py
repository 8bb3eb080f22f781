"""The error of a row that is not answered since its batch was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from coe.errors import InvalidRequest

CANCELLED, EXPIRED, FAILED = "batch_cancelled", "batch_expired", "batch_failed"
_TEXTS: Final = {
    CANCELLED: "This request was not answered before the batch was cancelled.",
    EXPIRED: "This request could not be answered before the completion window ended.",
    FAILED: "This request was not answered: the batch failed.",
}


def stopped(code: str) -> InvalidRequest:
    """The error, of scope REQUEST: no other expert is tried."""
    error = InvalidRequest(_TEXTS[code])
    error.code = code
    return error


def is_stopped(error: Mapping[str, Any]) -> bool:
    """Whether an OpenAI error object is such an error."""
    return error["code"] in _TEXTS
