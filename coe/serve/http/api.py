"""The OpenAI-compatible API, as an ASGI application over a Service.

    POST /v1/chat/completions, /v1/completions    an answer, as one body or as server-sent events
    POST /v1/responses                            an answer in OpenAI's newer form, which is not stored
    POST /v1/embeddings                           vectors of texts
    POST /v1/route                                the routing decision only
    GET  /v1/models, /v1/models/{id}, /health, /metrics
    POST /admin/load, /admin/unload               weights of experts into memory, and out of it
    GET  /admin/residency                         what is in memory, on each host
    *    /admin/experts, aliases, drain, pin, ...  changes of the experts (`admin_experts`)
    GET  /admin/decisions, /admin/routers         the last decisions; the routers of the policies
    GET  /ui                                      a page over these endpoints
    POST, GET, DELETE /v1/files, POST, GET /v1/batches    files of requests, answered beside the others (`batches`)
    GET  /openapi.json, /docs                     all of this, for machines and for people

Every answer names the expert (`model` and the `x-coe-*` headers); every error has OpenAI's shape. To add an endpoint,
add a `Route` in `build_api` and its handler below.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from uuid import uuid4

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from coe.protocol.answers import ChatAnswer, TextAnswer
from coe.protocol.embeddings import ParsedEmbedding
from coe.protocol.errors import INVALID, body_of
from coe.protocol.openapi import openapi_document
from coe.protocol.parsed import Parsed
from coe.protocol.requests import parse_chat, parse_completion
from coe.protocol.response_request import parse_response
from coe.protocol.responses import model_body, model_list
from coe.serve.http import admin, admin_experts, admin_reads
from coe.serve.http.batches import batch_routes
from coe.serve.http.call import Call, error_response
from coe.serve.http.choices import Choices
from coe.serve.http.docs_page import CONTENT_POLICY, docs_page
from coe.serve.http.embeddings import embedding_of, is_embedding, send_embeddings
from coe.serve.http.exchange import Exchange, headers_of
from coe.serve.http.explained import decisions_body, explained
from coe.serve.http.guard import guarded
from coe.serve.http.refusals import KeyNotAllowed, KeysUnavailable, Unauthorized
from coe.serve.http.request_spans import observed
from coe.serve.http.responses_api import respond, stored_response
from coe.serve.http.service import Service
from coe.serve.http.ui_page import ui_routes

_ANY: Final = ["GET", "POST", "DELETE"]
Handle = Callable[[Exchange, bytes], Coroutine[Any, Any, None]]


def build_api(service: Service) -> ASGIApp:
    """The ASGI application. It holds no resources; the caller closes the service."""
    chat = partial(answer, service, parse_chat, ChatAnswer)
    completion = partial(answer, service, parse_completion, TextAnswer)
    app = Starlette(
        middleware=guarded(service.settings),
        routes=[
            Route("/v1/chat/completions", Post(service, chat), methods=["POST"]),
            Route("/v1/completions", Post(service, completion), methods=["POST"]),
            Route("/v1/responses", Post(service, partial(respond, service)), methods=["POST"]),
            Route("/v1/responses/{id:path}", partial(_guarded, service, stored_response), methods=_ANY),
            Route("/v1/embeddings", Post(service, partial(embeddings, service)), methods=["POST"]),
            Route("/v1/route", Post(service, partial(route, service)), methods=["POST"]),
            Route("/v1/models", partial(_guarded, service, models)),
            Route("/v1/models/{id:path}", partial(_guarded, service, model)),
            *batch_routes(service),
            Route("/health", partial(_guarded, service, health)),
            Route("/metrics", partial(_guarded, service, metrics)),
            Route("/admin/load", partial(admin.answered, service, admin.load), methods=["POST"]),
            Route("/admin/unload", partial(admin.answered, service, admin.unload), methods=["POST"]),
            Route("/admin/residency", partial(admin.answered, service, admin.residency)),
            *admin_experts.routes(service),
            Route("/admin/decisions", partial(admin.answered, service, admin_reads.decisions)),
            Route("/admin/routers", partial(admin.answered, service, admin_reads.routers)),
            Route("/openapi.json", openapi),
            Route("/docs", docs),
            *(ui_routes() if service.settings.ui else ()),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a path with a trailing slash gets a 404 in OpenAI's shape
    return app


@dataclass(frozen=True, slots=True)
class Post:
    """An endpoint with a JSON body. A `Call` covers it from arrival to the last byte sent."""

    service: Service
    handle: Handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        try:
            async with self.service.call(scope["path"]) as call:
                with observed(call, scope):
                    await self._exchange(Exchange(call, scope, receive, send))
        except ClientDisconnect:
            return  # no client to answer; the call has recorded it

    async def _exchange(self, exchange: Exchange) -> None:
        try:
            async with self.service.within_deadline(exchange.call):
                exchange.call.access = await self.service.keyring.access(exchange.headers)  # before the body is read
                exchange.call.handled.key = exchange.call.access.id or ""
                body = await exchange.read(self.service.uploads)
                await exchange.unless_gone(self.handle(exchange, body))
        except ClientDisconnect:
            raise
        except Exception as error:
            await exchange.fail(error)


async def answer(
    service: Service,
    parse: Callable[[object], Parsed],
    bodies: type[ChatAnswer] | type[TextAnswer],
    exchange: Exchange,
    body: bytes,
) -> None:
    """Answer a request. A stream starts with the first text, so an earlier error still gets its own HTTP status."""
    call = exchange.call
    parsed = await service.accept(call, body, parse)
    reply = Choices(call, parsed, bodies)
    async with aclosing(service.answer(call, parsed)) as chunks:
        async for index, chunk in chunks:
            if parsed.stream and (events := reply.events(index, chunk)):
                await exchange.events(*events)
    if parsed.stream:
        await exchange.events(*reply.ending(explained(exchange)), last=True)
    else:
        await exchange.json(reply.whole() | explained(exchange))


async def embeddings(service: Service, exchange: Exchange, body: bytes) -> None:
    """The vectors of the inputs, all by the expert that the request names or that a policy chooses."""
    call = exchange.call
    parsed = await service.accept(call, body, partial(embedding_of, call))
    assert isinstance(parsed, ParsedEmbedding)
    async with aclosing(service.answer(call, parsed)) as chunks:
        async for _ in chunks:
            pass
    await send_embeddings(exchange, parsed)


async def route(service: Service, exchange: Exchange, body: bytes) -> None:
    """The decision for the body of a chat, a completion, an embedding or a response. No expert is called."""
    parsed = await service.accept(exchange.call, body, partial(_parse_any, exchange.call))
    await service.reserve(exchange.call, {"requests": len(parsed.requests)})
    await service.route(exchange.call, parsed)
    await exchange.json({"model": parsed.model, **decisions_body(exchange.call)})


async def models(service: Service, request: Request) -> Response:
    """Every value of a request's `model` that its key may use."""
    orchestrator, access = service.orchestrator, await service.keyring.access(request.headers)
    residence = service.weights.residence() if service.weights else {}
    policies, visible = access.policies(orchestrator.policies), access.experts(orchestrator.snapshot)
    auto = len(policies) == len(orchestrator.policies) or orchestrator.default_policy in policies
    return JSONResponse(
        model_list(orchestrator.snapshot, policies, service.started_at, residence, auto=auto, visible=visible)
    )


async def model(service: Service, request: Request) -> Response:
    """One model by id."""
    name, orchestrator = request.path_params["id"], service.orchestrator
    (await service.keyring.access(request.headers)).check(name, orchestrator)
    residence = service.weights.residence() if service.weights else {}
    return JSONResponse(model_body(name, orchestrator.snapshot, service.started_at, residence))


async def health(service: Service, request: Request) -> Response:
    """200 when requests can be answered, otherwise 503 with the problem."""
    ok, about = await service.health(all_of_it=await _may_watch(service, request))
    return JSONResponse(about, 200 if ok else 503)


async def metrics(service: Service, request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    if service.metrics is None:
        raise HTTPException(404)
    access = await service.keyring.access(request.headers)
    if not access.metrics:
        raise KeyNotAllowed(f"the key {access.id} may not read the metrics (`coe keys create NAME --metrics`)")
    page, content_type = await service.metrics.render()
    return Response(page, headers={"content-type": content_type})


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return JSONResponse(openapi_document())


async def docs(request: Request) -> Response:
    """The OpenAPI document as a page."""
    return Response(docs_page(), media_type="text/html", headers={"content-security-policy": CONTENT_POLICY})


async def _may_watch(service: Service, request: Request) -> bool:
    try:
        return (await service.keyring.access(request.headers)).metrics
    except (Unauthorized, KeysUnavailable):
        return False


def _parse_any(call: Call, body: object) -> Parsed:
    if not isinstance(body, dict) or "messages" in body:
        return parse_chat(body)
    if "input" in body:
        return embedding_of(call, body) if is_embedding(call, body) else parse_response(body)
    return parse_completion(body) if "prompt" in body else parse_chat(body)


async def _guarded(
    service: Service, endpoint: Callable[[Service, Request], Awaitable[Response]], request: Request
) -> Response:
    """An endpoint without a body. Its errors have OpenAI's shape too."""
    try:
        return await endpoint(service, request)
    except HTTPException:
        raise
    except Exception as error:
        status, body = error_response(error, uuid4().hex, request.url.path)
        return JSONResponse(body, status, headers_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors for unknown paths and methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "")
        body = body_of(f"{where}: method not allowed; use {allowed}", INVALID, "method_not_supported")
    else:
        body = body_of(
            f"{where}: no such endpoint; GET /docs lists the endpoints",
            INVALID,
            "unknown_url",
        )
    return JSONResponse(body, error.status_code, error.headers)
