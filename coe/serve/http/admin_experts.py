"""Admin calls that change the experts of a running service: add, drain, remove, pin, and move aliases.

They are admitted as those of `admin` are. Where the experts are in files of the configuration they get 501.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from coe.errors import InvalidRequest, Unsupported
from coe.serve.http.admin import admitted, answered, named, seconds, within_deadline
from coe.serve.http.changes import ExpertChanges
from coe.serve.http.refusals import UnsupportedMediaType
from coe.serve.http.service import Service

REMOVE_WAIT_S: Final = 30.0
"""Seconds that a removal waits for requests in progress unless it states `wait_s`."""
_MEDIA: Final = re.compile(r"(application|text)/(json|yaml|x-yaml)\s*(;.*)?", re.IGNORECASE)
Change = Callable[[ExpertChanges, Service, Request, str], Awaitable[Mapping[str, Any]]]


def routes(service: Service) -> list[Route]:
    """The routes of these calls."""
    listed: list[tuple[str, str, Change]] = [
        ("GET", "/admin/experts", _listing),
        ("POST", "/admin/experts", _add),
        ("DELETE", "/admin/experts/{name:path}", _remove),
        ("POST", "/admin/drain", _drain),
        ("POST", "/admin/undrain", _undrain),
        ("POST", "/admin/pin", partial(_pin, pinned=True)),
        ("POST", "/admin/unpin", partial(_pin, pinned=False)),
        ("POST", "/admin/aliases", partial(_point, exists=None)),
        ("DELETE", "/admin/aliases/{name:path}", _delete_alias),
        ("POST", "/admin/promote", partial(_point, exists=True)),
        ("POST", "/admin/rollback", _roll_back),
    ]
    return [
        Route(path, partial(answered, service, partial(_changed, change)), methods=[method])
        for method, path, change in listed
    ]


async def _changed(change: Change, service: Service, request: Request) -> Response:
    by = await admitted(service, request)
    if service.changes is None:
        raise Unsupported("this endpoint does not change experts")
    async with within_deadline(service):
        return JSONResponse(await change(service.changes, service, request, by))


async def _listing(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    return await changes.listing()


async def _add(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    declared = request.headers.get("content-type", "")
    if not _MEDIA.fullmatch(declared.strip()):
        raise UnsupportedMediaType(
            f"the Content-Type is application/yaml or application/json, not {declared[:80]!r}: "
            "curl -H 'content-type: application/yaml' --data-binary @expert.yaml"
        )
    length = request.headers.get("content-length", "")
    body = await service.uploads.read(partial(_message, request), int(length[:20]) if length.isdecimal() else None)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start})") from error
    if (dry := request.query_params.get("dry_run", "false")) not in ("true", "false"):
        raise InvalidRequest(f"dry_run is true or false, not {dry[:40]!r}")
    return await changes.add(text, by, dry_run=dry == "true")


async def _message(request: Request) -> Message:
    """The next part of the body. Raises InvalidRequest if the client has gone: what came before is not the whole."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise InvalidRequest("the client left before the body was whole; nothing changed")
    return message


async def _remove(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    most = service.settings.deadline_s
    wait_s = seconds(request, most) if "wait_s" in request.query_params else min(REMOVE_WAIT_S, most / 2)
    return await changes.remove(request.path_params["name"], by, wait_s=wait_s)


async def _drain(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    wait_s = seconds(request, service.settings.deadline_s)
    return await changes.drain(named(request), request.query_params.get("reason", ""), by, wait_s=wait_s)


async def _undrain(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    return await changes.drain(named(request), None, by, wait_s=0.0)


async def _pin(
    changes: ExpertChanges, service: Service, request: Request, by: str, *, pinned: bool
) -> Mapping[str, Any]:
    return await changes.pin(named(request), pinned, by)


async def _point(
    changes: ExpertChanges, service: Service, request: Request, by: str, *, exists: bool | None
) -> Mapping[str, Any]:
    return await changes.point(_one(request, "alias"), _one(request, "to"), by, exists=exists)


async def _roll_back(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    return await changes.roll_back(_one(request, "alias"), by)


async def _delete_alias(changes: ExpertChanges, service: Service, request: Request, by: str) -> Mapping[str, Any]:
    return await changes.delete(request.path_params["name"], by)


def _one(request: Request, name: str) -> str:
    """The value of a parameter that is given once. Raises InvalidRequest."""
    values = request.query_params.getlist(name)
    if len(values) != 1 or not values[0]:
        raise InvalidRequest(f"name one {name}, as ?{name}=...; got {len(values)}")
    return values[0]
