"""Requests that are refused before their body is parsed: by headers, host, origin, or a body that arrives too slowly.

InvalidRequest
├── UnsupportedMediaType   the body is not declared as plain JSON
├── HeadersTooLarge        URL and headers exceed the limit
├── HostNotAllowed         the `Host` header names another site
├── OriginNotAllowed       a page of another site sent the request
├── Unauthorized           no API key, or one that is not valid (401)
├── KeyNotAllowed          the API key may not make this call
├── NotStored              a response is read by its id, and none is stored (404)
├── AdminNotAllowed        an admin call without the key, or without a key from another machine
└── BodyTimeout            the body did not arrive in time; the connection is closed

KeysUnavailable            the API keys cannot be read (503)
Full                       too many requests are in flight; with the seconds until there is room (429)
└── LimitReached           a limit of the API key is reached (429)
"""

from __future__ import annotations

from coe.errors import CoeError, InvalidRequest, Overloaded


class UnsupportedMediaType(InvalidRequest, status=415, code="unsupported_media_type"):
    """The body is not declared as uncompressed JSON in UTF-8."""


class HeadersTooLarge(InvalidRequest, status=431, code="request_header_fields_too_large"):
    """URL and headers exceed the limit."""


class HostNotAllowed(InvalidRequest, status=403, code="host_not_allowed"):
    """The `Host` header is not one of the allowed hosts."""


class OriginNotAllowed(InvalidRequest, status=403, code="origin_not_allowed"):
    """The `Origin` header is neither this endpoint's own nor a configured one."""


class Unauthorized(InvalidRequest, status=401, code="invalid_api_key"):
    """The request has no API key of this service, or one that is revoked or expired."""


class KeyNotAllowed(InvalidRequest, status=403, code="key_not_allowed"):
    """The API key of the request may not make this call."""


class KeysUnavailable(CoeError, status=503, code="keys_unavailable", retryable=True, internal=False):
    """The API keys could not be read for too long."""


class Full(Overloaded):
    """This process has `max_in_flight` requests; `retry_after_s` is the expected time until there is room."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Full], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s or 0.0)


class LimitReached(Full, code="rate_limit_exceeded"):
    """A limit of the API key is reached; with what is left and until when."""


class NotStored(InvalidRequest, status=404, code="response_not_found"):
    """A response is read, changed or cancelled by its id, and none is stored."""


class AdminNotAllowed(InvalidRequest, status=403, code="admin_not_allowed"):
    """An admin call lacks the configured key or, where none is configured, does not come from this machine."""


class BodyTimeout(InvalidRequest, status=408, code="request_timeout", retryable=True):
    """The body did not arrive in time."""
