"""`/v1/files` and `/v1/batches`: OpenAI's, over what `serve.batches` turns on (`coe.serve.batches`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import IO, Any, Final
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from coe.errors import InvalidRequest
from coe.protocol.batches import file_form, page_of, parse_batch
from coe.serve.http.batch_store import Batches, Stored
from coe.serve.http.call import error_response
from coe.serve.http.exchange import check_media, header_text, headers_of
from coe.serve.http.json_body import JsonBody, parse_json
from coe.serve.http.keyring import Access
from coe.serve.http.service import Service

READ_BYTES: Final = 256 * 1024
"""Bytes of a download that are in memory."""


class BatchesOff(InvalidRequest, status=501, code="batches_off"):
    """The service has no folder for files and batches."""


Handle = Callable[[Batches, Access, Request], Awaitable[Response]]


def batch_routes(service: Service) -> list[Route]:
    """The endpoints."""

    def route(path: str, handle: Handle, method: str = "GET") -> Route:
        return Route(path, _Endpoint(service, handle), methods=[method])

    return [
        route("/v1/files", upload, "POST"),
        route("/v1/files", files),
        route("/v1/files/{id}", file),
        route("/v1/files/{id}", delete, "DELETE"),
        route("/v1/files/{id}/content", content),
        route("/v1/batches", partial(create, service), "POST"),
        route("/v1/batches", batches),
        route("/v1/batches/{id}", batch),
        route("/v1/batches/{id}/cancel", cancel, "POST"),
    ]


async def upload(batches: Batches, access: Access, request: Request) -> Response:
    """A file of a multipart form, written to disk while it arrives."""
    stored = await batches.upload()
    try:
        form = await batches.uploads.read(request, _Threaded(stored))
        purpose, keep_s = file_form(form.fields)
        return JSONResponse(await batches.commit(access, stored, form.filename, purpose, keep_s))
    finally:
        await asyncio.shield(asyncio.to_thread(stored.discard))


async def files(batches: Batches, access: Access, request: Request) -> Response:
    """A page of the files."""
    purpose = request.query_params.get("purpose")
    found = [each for each in await batches.files(access) if purpose is None or each["purpose"] == purpose]
    return JSONResponse(page_of(found, request.query_params, most=10_000, usual=10_000))


async def file(batches: Batches, access: Access, request: Request) -> Response:
    """One file."""
    return JSONResponse(await batches.file(access, request.path_params["id"]))


async def delete(batches: Batches, access: Access, request: Request) -> Response:
    """Delete a file."""
    file_id = request.path_params["id"]
    await batches.delete(access, file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def content(batches: Batches, access: Access, request: Request) -> Response:
    """The bytes of a file."""
    about, opened = await batches.content(access, request.path_params["id"])
    name = header_text(about["filename"]).replace('"', "'").replace("\\", "_")
    headers = {
        "content-length": str(about["bytes"]),
        "content-disposition": f'attachment; filename="{name}"',  # a browser does not show what somebody uploaded
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_pieces(opened), media_type="application/octet-stream", headers=headers)


async def create(service: Service, batches: Batches, access: Access, request: Request) -> Response:
    """Make a batch of an uploaded file."""
    check_media(request.headers.get("content-type", ""), request.headers.get("content-encoding", ""))
    length = request.headers.get("content-length", "")
    body = await service.uploads.read(request.receive, int(length[:20]) if length.isdecimal() else None)
    return JSONResponse(await batches.create(access, parse_batch(parse_json(body))))


async def batches(batches: Batches, access: Access, request: Request) -> Response:
    """A page of the batches, the newest first."""
    found = list(reversed(await batches.batches(access)))
    return JSONResponse(page_of(found, request.query_params, most=100, usual=20, ordered=False))


async def batch(batches: Batches, access: Access, request: Request) -> Response:
    """One batch."""
    return JSONResponse(await batches.batch(access, request.path_params["id"]))


async def cancel(batches: Batches, access: Access, request: Request) -> Response:
    """Cancel a batch; what was answered so far stays its result."""
    return JSONResponse(await batches.cancel(access, request.path_params["id"]))


class _Endpoint:
    """A handler behind the API keys. An ASGI application, so that Starlette leaves the body to it."""

    def __init__(self, service: Service, handle: Handle) -> None:
        self._service, self._handle = service, handle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive, send)
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            return  # no client to answer
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        service = self._service
        try:
            access = await service.keyring.access(request.headers)
            if service.batches is None:
                raise BatchesOff("this service keeps no files and batches: its operator sets `serve.batches.folder`")
            return await self._handle(service.batches, access, request)
        except (ClientDisconnect, HTTPException):
            raise
        except Exception as error:
            status, body = error_response(error, uuid4().hex, request.url.path)
            return JsonBody(body, status, headers_of(error))


class _Threaded:
    """A `file_uploads.Sink` that writes to an upload in a thread: the disk may be slow."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    async def write(self, data: bytes) -> None:
        """Write what follows."""
        await asyncio.to_thread(self._stored.write, data)


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(file.read, READ_BYTES):
            yield piece
    finally:
        file.close()
