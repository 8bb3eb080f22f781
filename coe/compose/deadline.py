"""The deadline of a request, divided among the calls of its composition."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from coe.compose.base import ExpertCall
from coe.types import Chunk, GenerateRequest

LEAST_S: Final = 1e-3
"""Deadline of a call for which no time is left: it ends at once with DeadlineExceeded. Less is not counted."""


def left_s(request: GenerateRequest, elapsed_s: float, share: float = 1.0) -> float | None:
    """Seconds left until this share of the request's deadline has passed; None without a deadline."""
    return None if request.deadline_s is None else max(request.deadline_s * share - elapsed_s, LEAST_S)


def within(call: ExpertCall, seconds: float | None) -> ExpertCall:
    """The call with a deadline of at most `seconds`."""
    if seconds is None or (call.request.deadline_s is not None and call.request.deadline_s - seconds < LEAST_S):
        return call
    return replace(call, request=replace(call.request, deadline_s=min(call.request.deadline_s or seconds, seconds)))


async def begun_within(
    chunks: AsyncGenerator[Chunk, None], seconds: float, late: Callable[[], None]
) -> AsyncGenerator[Chunk, None]:
    """The same chunks; if the first one does not come within `seconds`, none, after a call of `late`."""
    async with aclosing(chunks):
        try:
            async with asyncio.timeout(seconds) as begin:
                first = await anext(chunks, None)
        except TimeoutError:
            if not begin.expired():
                raise
            late()
            return
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk
