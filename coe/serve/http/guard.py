"""What is checked of every request before its endpoint: bytes of URL and headers, host and origin.

A web page can send requests to any address that the browser can reach, including 127.0.0.1. Two checks stop it: the
`Host` header must be an allowed one (a page whose own name was rebound to this address sends that name), and a request
that costs something must not be cross-origin. Starlette's TrustedHostMiddleware is not used: its error is plain
text, and it has no rule for IP addresses.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from coe.config import ServeConfig
from coe.errors import InvalidRequest
from coe.protocol.errors import error_body
from coe.serve.http.json_body import JsonBody
from coe.serve.http.refusals import HeadersTooLarge, HostNotAllowed, OriginNotAllowed

MOST_HEADER_BYTES: Final = 64 * 1024
"""Most bytes of URL and headers together."""
MOST_NAME: Final = 255
"""Most characters of a host name (DNS) with its port."""
DISCLOSED: Final = ("router", "expert", "confidence", "decision-id", "notes", "truncated", "degraded", "warning")
"""Headers `x-coe-...` that a page of an allowed origin may read."""


def guarded(settings: ServeConfig) -> list[Middleware]:
    """The middleware of the API: the guard, then CORS where origins are configured."""
    guard = Middleware(Guard, hosts=hosts_of(settings), origins=settings.cors_origins)
    if not settings.cors_origins:
        return [guard]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("retry-after", *(f"x-coe-{name}" for name in DISCLOSED)),
    )
    return [guard, cors]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def hosts_of(settings: ServeConfig) -> tuple[str, ...]:
    """The allowed hosts; an empty name stands for every IP address."""
    if settings.allowed_hosts is not None:
        return tuple(host.lower() for host in settings.allowed_hosts)
    return ("localhost", "*.localhost", settings.host.lower(), "") if is_loopback(settings.host) else ("*",)


class Guard:
    """ASGI middleware that refuses requests by their headers.

    Args:
        hosts: allowed host names; `*` for all, `*.example.com` for subdomains, an empty name for every IP address.
        origins: origins besides the endpoint's own that may send requests; `*` for all.
    """

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
        self._app, self._hosts, self._origins = app, hosts, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except InvalidRequest as error:
                status, body = error_body(error)
                return await JsonBody(body, status)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        size = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        hosts, origin = [], None
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"host":
                hosts.append(value.decode("latin-1"))
            elif name == b"origin":
                origin = value.decode("latin-1")
        if size > MOST_HEADER_BYTES:
            raise HeadersTooLarge(f"URL and headers exceed {MOST_HEADER_BYTES:,} bytes")
        if "*" not in self._hosts:
            for host in hosts:
                self._check_host(host)
        if origin is not None and scope["method"] not in ("GET", "HEAD"):
            self._check_origin(origin, hosts)

    def _check_host(self, host: str) -> None:
        if len(host) > MOST_NAME or not is_allowed(host, self._hosts):
            raise HostNotAllowed(
                f"requests for the host {host[:MOST_NAME]!r} are not served: add it to serve.allowed_hosts, or use the "
                "address that the server printed when it started"
            )

    def _check_origin(self, origin: str, hosts: list[str]) -> None:
        if "*" in self._origins or origin in self._origins or origin.partition("://")[2] in hosts:
            return
        raise OriginNotAllowed(
            f"requests of web pages from {origin[:MOST_NAME]!r} are not served: add the origin to serve.cors_origins"
        )


@lru_cache(maxsize=1024)
def is_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether the value of a `Host` header is allowed; its port is ignored."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "" in allowed and _is_address(name):
        return True
    return bool(name) and any(
        name == pattern.strip("[]") or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in allowed
        if pattern
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
