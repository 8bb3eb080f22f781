"""`/v1/responses`: OpenAI's newer form of a chat, without a store: a request has the whole conversation."""

from __future__ import annotations

from contextlib import aclosing

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from coe.errors import InvalidRequest
from coe.protocol.response_events import ResponseEvents
from coe.protocol.response_output import ResponseObject
from coe.protocol.response_request import ParsedResponse, field_of, parse_response
from coe.serve.http.exchange import Exchange
from coe.serve.http.explained import explained
from coe.serve.http.refusals import NotStored
from coe.serve.http.service import Service


async def respond(service: Service, exchange: Exchange, body: bytes) -> None:
    """Answer a request. A stream starts with the first text, so an earlier error still gets its own HTTP status."""
    parsed = await service.accept(exchange.call, body, parse_response)
    assert isinstance(parsed, ParsedResponse)
    try:
        await _answer(service, exchange, parsed)
    except InvalidRequest as error:
        error.param = field_of(error.param)  # of an engine or an endpoint, which knows the request as a chat
        raise


async def stored_response(service: Service, request: Request) -> Response:
    """A response by its id: there is none.

    Raises:
        NotStored: always.
        HTTPException: 404, without an id.
    """
    if not request.path_params["id"]:
        raise HTTPException(404)
    await service.keyring.access(request.headers)
    raise NotStored(
        "responses are not stored by this service (`store` has no effect): keep the items of a response, and send them "
        "in `input`"
    )


async def _answer(service: Service, exchange: Exchange, parsed: ParsedResponse) -> None:
    call = exchange.call
    events: ResponseEvents | None = None
    async with aclosing(service.answer(call, parsed)) as chunks:
        async for _, chunk in chunks:
            if not parsed.stream:
                continue
            if events is None:
                events = ResponseEvents(_response(exchange, parsed))
                exchange.ends_with(b"", events.failed)
            if new := events.chunk(chunk):
                await exchange.events(*new)
    answer = call.replies[0].answer
    assert answer is not None  # an answer without an error is whole
    if events is not None:
        await exchange.events(*events.ending(answer, _now(exchange), explained(exchange)), last=True)
    else:
        await exchange.json(_response(exchange, parsed).whole(answer, _now(exchange)) | explained(exchange))


def _response(exchange: Exchange, parsed: ParsedResponse) -> ResponseObject:
    call = exchange.call
    expert = call.replies[0].expert
    assert expert is not None  # known from the first chunk on
    return ResponseObject(call.id, int(call.started_at), expert, parsed.echo)


def _now(exchange: Exchange) -> float:
    return exchange.call.started_at + exchange.call.elapsed_s
