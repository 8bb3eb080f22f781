"""`/v1/embeddings` over a service: what a request addresses, and its response."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from coe.engines.embedding import read_vectors, shortened
from coe.policy import AUTO, Policy
from coe.protocol.embeddings import (
    ParsedEmbedding,
    check_size,
    embedding_ending,
    embedding_model,
    embedding_pieces,
    embeds_only,
    parse_embedding,
)
from coe.serve.http.call import Call
from coe.serve.http.exchange import Exchange
from coe.serve.http.explained import explained
from registry.spec import ExpertSpec

STEP_BYTES: Final = 64 * 1024
"""Bytes of a response that are written at once, on the event loop: a large one has megabytes."""


def embedding_of(call: Call, body: object) -> ParsedEmbedding:
    """The parsed body; its `model` is the policy that `auto` is for the experts and policies that the key may use.

    Raises:
        InvalidRequest: its fields are wrong, or `model` returns no embeddings.
    """
    parsed = parse_embedding(body)
    model = call.orchestrator.snapshot.resolve(parsed.model)  # an alias
    return replace(parsed, model=embedding_model(model, *_usable(call)))


def is_embedding(call: Call, body: Mapping[str, Any]) -> bool:
    """Whether a body with `input` is of an embedding, and not of a response: it is a list, but not of items, or `model`
    returns vectors only. A text for `auto` is a response's."""
    given, model = body["input"], body.get("model")
    if isinstance(given, list) and given:
        return not isinstance(given[0], dict)
    if not isinstance(model, str) or model == AUTO:
        return False
    return embeds_only(call.orchestrator.snapshot.resolve(model), *_usable(call))


def _usable(call: Call) -> tuple[Mapping[str, Policy], Mapping[str, ExpertSpec]]:
    """The policies and experts that a request may use."""
    visible, experts = call.visible, call.orchestrator.snapshot.experts
    known = experts if visible is None else {name: experts[name] for name in experts if name in visible}
    return call.access.policies(call.orchestrator.policies), known


async def send_embeddings(exchange: Exchange, parsed: ParsedEmbedding) -> None:
    """Send the vectors of an answer.

    Raises:
        Rejected: they have fewer dimensions than the request wants.
        InvalidRequest: the response would be too large.
        EngineError: the engine returned no vectors.
    """
    [reply] = exchange.call.replies
    answer = reply.answer
    assert answer is not None  # an answer without an error is whole
    vectors = read_vectors(answer.value, len(parsed.request.inputs), expert=answer.expert)
    vectors = shortened(vectors, parsed.dimensions, expert=answer.expert)
    check_size(vectors)
    body, n_written = bytearray(), 0
    for piece in embedding_pieces(vectors, answer, base64=parsed.base64):
        body += piece
        if len(body) - n_written > STEP_BYTES:
            n_written = len(body)
            await asyncio.sleep(0)
    await exchange.json_text(bytes(body) + embedding_ending(explained(exchange)))
