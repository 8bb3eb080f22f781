"""A staged composed expert inside one host: it calls the peers, then the expert with their notes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from coe.engines.latent.calls import left_notes, peer_calls
from coe.errors import EngineError
from coe.seam import expert_error, public_text
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec

logger = logging.getLogger(__name__)
Ask = Callable[[str, GenerateRequest], AsyncGenerator[Chunk, None]]


async def ask_with_peers(spec: ExpertSpec, request: GenerateRequest, ask: Ask) -> AsyncGenerator[Chunk, None]:
    """The chunks of the expert, asked with the notes of its peers; the usage of the last one includes theirs.

    Where a composition calls the expert, `coe.compose.with_peers` makes the same calls, on any host. A peer that fails
    is left out, and named in the notes of the last chunk.

    Args:
        ask: calls an expert of this host.
    """
    calls = peer_calls(spec, request)
    ended = await asyncio.gather(*(_last(ask, call.peer, call.request) for call in calls), return_exceptions=True)
    lasts: list[Chunk | None] = []
    remarks: list[str] = []
    for call, outcome in zip(calls, ended, strict=True):
        if isinstance(outcome, Exception):
            error = expert_error(call.peer, outcome)
            logger.warning("%s answers without the notes of %s: %s", spec.name, call.peer, error)
            remarks.append(f"{call.peer} left no notes: {public_text(error)}")
        elif isinstance(outcome, BaseException):
            raise outcome
        lasts.append(None if isinstance(outcome, BaseException) else outcome)
    notes = left_notes(calls, [None if last is None else last.value for last in lasts])
    usages = [last.usage for last in lasts if last is not None and last.usage is not None]
    async with aclosing(ask(spec.name, replace(request, notes=notes))) as chunks:
        async for chunk in chunks:
            if chunk.usage is not None:
                whole = Usage.total([chunk.usage, *usages])
                chunk = replace(chunk, usage=whole, notes=(*dict.fromkeys(remarks), *chunk.notes))
            yield chunk


async def _last(ask: Ask, peer: str, request: GenerateRequest) -> Chunk:
    async with aclosing(ask(peer, request)) as chunks:
        async for chunk in chunks:
            if chunk.finish_reason is not None:
                return chunk
    raise EngineError(f"{peer!r} stopped without finishing its answer")
