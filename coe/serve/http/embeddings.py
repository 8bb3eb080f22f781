"""The response of `/v1/embeddings`."""

from __future__ import annotations

import asyncio
from typing import Final

from coe.engines.embedding import read_vectors, shortened
from coe.protocol.embeddings import ParsedEmbedding, check_size, embedding_ending, embedding_pieces
from coe.serve.http.exchange import Exchange
from coe.serve.http.explained import explained

STEP_BYTES: Final = 64 * 1024
"""Bytes of a response that are written at once, on the event loop: a large one has megabytes."""


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
