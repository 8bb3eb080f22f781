"""Admin calls: load and unload experts on a running service, and see what is in memory.

Those here take names of registered experts and nothing else; `admin_experts` changes the experts. With
`serve.admin_key_env` they are accepted with that key, and where the service has API keys, with one that may make them.
Without any, they must come from a program on this machine, which the address of the connection shows: so what a proxy
has passed on is refused, and what a web page sends, since the address of its browser may be this machine's.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coe.config import ServeConfig
from coe.errors import CoeError, DeadlineExceeded, InvalidRequest, Unsupported
from coe.protocol.errors import error_body
from coe.serve.http.guard import is_allowed
from coe.serve.http.keyring import keyed
from coe.serve.http.refusals import AdminNotAllowed
from coe.serve.http.service import Service, Weights
from registry.errors import RegistryError

MOST_EXPERTS: Final = 256
"""Most experts of one call."""
_LOCAL: Final = ("localhost", "*.localhost", "")
"""Values of `Host` that a page whose name was rebound to this address does not send; the empty name: IP addresses."""
_PASSED_ON: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Headers of requests that a proxy has passed on."""

logger = logging.getLogger(__name__)


async def answered(
    service: Service, handle: Callable[[Service, Request], Awaitable[Response]], request: Request
) -> Response:
    """The response of an admin endpoint. Its errors have their full text: the reader is the operator."""
    try:
        return await handle(service, request)
    except (CoeError, RegistryError) as error:
        status, body = error_body(error)
        if status >= 500:
            logger.warning("%s failed", request.url.path, exc_info=error)
        return JSONResponse(body, status)


async def load(service: Service, request: Request) -> Response:
    """Load the experts of `?expert=NAME&expert=...` together, on every host that serves them, and wait for it."""
    weights = await _admitted(service, request)
    names = _experts(service, request)
    async with within_deadline(service):
        hosts = await weights.load(*names)
    return JSONResponse({"object": "coe.load", "experts": names, "hosts": list(hosts)})


async def unload(service: Service, request: Request) -> Response:
    """Free the memory of the experts' weights on every host that serves them.

    `&wait_s=SECONDS` waits that long for requests that use them; then, or without it, 409 says that they are in use.
    """
    weights = await _admitted(service, request)
    names, wait_s = _experts(service, request), seconds(request, service.settings.deadline_s)
    async with within_deadline(service):
        hosts = await weights.unload(*names, wait_s=wait_s)
    return JSONResponse({"object": "coe.unload", "experts": names, "hosts": list(hosts)})


async def residency(service: Service, request: Request) -> Response:
    """Budget, bytes in use and weights of every host."""
    weights = await _admitted(service, request)
    async with within_deadline(service):
        hosts = [_residency_of(state) for state in await weights.states()]
    return JSONResponse({"object": "coe.residency", "hosts": hosts})


def check_allowed(settings: ServeConfig, client: str | None, headers: Mapping[str, str]) -> None:
    """Whether a request may make an admin call.

    Args:
        client: address of the other end of the connection.
        headers: by lower-case name.

    Raises:
        AdminNotAllowed: it may not; the message says what is needed.
    """
    if settings.admin_key_env is not None:
        _check_key(settings.admin_key_env, headers)
        return
    if settings.http_path == "haproxy" or any(name in headers for name in _PASSED_ON) or not _is_loopback(client):
        raise AdminNotAllowed(
            "admin calls are accepted from this machine only, without a proxy between; for others set "
            "serve.admin_key_env to the name of an environment variable with a key, and send it as `Authorization: "
            "Bearer KEY`"
        )
    if "origin" in headers or not is_allowed(headers.get("host", ""), _LOCAL):
        raise AdminNotAllowed(
            "admin calls of web pages are not accepted, and `Host` must be localhost or an IP address; with "
            "serve.admin_key_env, the key decides"
        )


def _has_key(settings: ServeConfig, headers: Mapping[str, str]) -> bool:
    """Whether a request sends the key of `serve.admin_key_env`."""
    if settings.admin_key_env is None:
        return False
    try:
        _check_key(settings.admin_key_env, headers)
    except AdminNotAllowed:
        return False
    return True


def _check_key(variable: str, headers: Mapping[str, str]) -> None:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise AdminNotAllowed(
            f"no admin call is accepted: serve.admin_key_env names {variable}, which is not set in the environment of "
            "the gateway"
        )
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), key.encode()):
        raise AdminNotAllowed(
            "admin calls need the key of serve.admin_key_env as `Authorization: Bearer KEY` (`--api-key-env`)"
        )


def _is_loopback(client: str | None) -> bool:
    try:
        address = ipaddress.ip_address(client or "")
    except ValueError:  # unknown, or a Unix socket
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


async def admitted(service: Service, request: Request) -> str:
    """Who makes an admin call, as logs name them.

    Raises:
        AdminNotAllowed, Unauthorized, KeyNotAllowed: it is not accepted. Where there are API keys, it needs one for
            admin calls, or that of `serve.admin_key_env`.
    """
    headers = {name.lower(): value for name, value in request.headers.items()}
    if await service.keyring.required() and not _has_key(service.settings, headers):
        return f"key {(await keyed(service.keyring, headers)).id}"
    check_allowed(service.settings, None if request.client is None else request.client.host, headers)
    return "this machine" if service.settings.admin_key_env is None else "the admin key"


async def _admitted(service: Service, request: Request) -> Weights:
    """The weights that an admin call is about. Raises as `admitted`."""
    await admitted(service, request)
    if service.weights is None:
        raise Unsupported("this endpoint does not manage the memory of experts")
    return service.weights


def named(request: Request) -> list[str]:
    """The values of `?expert=`, each once. Raises InvalidRequest."""
    names = list(dict.fromkeys(request.query_params.getlist("expert")))
    if not 1 <= len(names) <= MOST_EXPERTS:
        raise InvalidRequest(f"name 1 to {MOST_EXPERTS} experts, as ?expert=NAME&expert=NAME; got {len(names)}")
    return names


def _experts(service: Service, request: Request) -> list[str]:
    names = named(request)
    return [service.orchestrator.snapshot.get(name).name for name in names]


def seconds(request: Request, most: float) -> float:
    """The value of `?wait_s=`, 0 by default. Raises InvalidRequest."""
    text = request.query_params.get("wait_s", "0")
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s <= most:
        raise InvalidRequest(f"wait_s is a number of seconds from 0 to {most:g} (serve.deadline_s), not {text[:40]!r}")
    return wait_s


@asynccontextmanager
async def within_deadline(service: Service) -> AsyncIterator[None]:
    """Bound the block by the deadline of the service. Raises DeadlineExceeded; what was begun at a host goes on."""
    deadline_s = service.settings.deadline_s
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"not done within {deadline_s:g} s (serve.deadline_s); what was begun goes on: see GET /admin/residency"
        ) from error


def _residency_of(state: Mapping[str, Any]) -> dict[str, Any]:
    memory = ("budget_bytes", "used_bytes", "busy", "unhealthy", "weights", "copies", "endpoints")
    kept = ("pool", "id", "process", "responds", *memory)
    return {name: state[name] for name in kept if name in state}
