"""The seam of engines: their chunks, with the contract of `Expert.generate` enforced.

An engine may come from another package. Whatever it raises becomes an error of its expert (`coe.seam`), so that another
expert can answer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any, Final, get_args

from coe.engines.base import Expert
from coe.errors import EngineError
from coe.seam import is_interrupt, raise_as_of, text_of
from coe.types import Chunk, FinishReason, Usage
from registry.spec import ExpertSpec

_REASONS: Final = frozenset(get_args(FinishReason))
logger = logging.getLogger(__name__)


def checked_expert(spec: ExpertSpec, expert: Any) -> Expert:
    """What an engine's `load` returned. Raises EngineError if it is no `Expert`."""
    capacity = getattr(expert, "capacity", None)
    if not callable(getattr(expert, "generate", None)) or not isinstance(capacity, int) or capacity < 1:
        raise EngineError(
            f"{spec.name!r} cannot be loaded: its engine returned {type(expert).__name__}, which is no Expert with "
            f"`generate` and a `capacity` of at least 1 (coe.engines.base)"
        )
    ahead = getattr(expert, "ahead", 0)
    if not isinstance(ahead, int) or ahead < 0:
        raise EngineError(
            f"{spec.name!r} cannot be loaded: its engine states an `ahead` that is not 0 or more requests"
        )
    loaded: Expert = expert
    return loaded


def problem_of(expert: Any) -> str | None:
    """Why an expert does not answer now (its optional `unhealthy()`); None if it does, or does not state it."""
    try:
        unhealthy = getattr(expert, "unhealthy", None)
        problem = unhealthy() if callable(unhealthy) else None
    except BaseException as error:
        if is_interrupt(error):
            raise
        return f"its state cannot be read: {text_of(error)}"
    return problem if problem is None else str(problem)


def bytes_of(expert: Any) -> int | None:
    """The measured bytes of an expert (its optional `memory_bytes()`); None where it does not measure them."""
    try:
        memory_bytes = getattr(expert, "memory_bytes", None)
        measured = memory_bytes() if callable(memory_bytes) else None
    except BaseException as error:
        if is_interrupt(error):
            raise
        logger.warning("an expert's memory cannot be read: %s", text_of(error), exc_info=error)
        return None
    return measured if isinstance(measured, int) and measured > 0 else None


def endpoints_of(expert: Any) -> list[dict[str, Any]]:
    """The state of each endpoint of an expert (its optional `endpoint_states()`); none where it states none."""
    try:
        states = getattr(expert, "endpoint_states", None)
        return list(states()) if callable(states) else []
    except BaseException as error:
        if is_interrupt(error):
            raise
        logger.warning("the endpoints of an expert cannot be read: %s", text_of(error), exc_info=error)
        return []


async def checked(expert: str, generate: Callable[[], Any]) -> AsyncGenerator[Chunk, None]:
    """The chunks of `generate()`, up to the last one. Closing the iterator closes the engine's.

    Raises:
        CoeError: never of scope REQUEST, and readable by other processes.
    """
    try:
        chunks: Any = aiter(generate())
    except BaseException as error:
        raise_as_of(expert, error)
    try:
        while True:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                raise EngineError(f"{expert!r} stopped without finishing its answer") from None
            except BaseException as error:
                raise_as_of(expert, error)
            if wrong := _wrong(chunk):
                raise EngineError(f"{expert!r} failed: its engine yields {wrong}")
            yield chunk if _is_plain(chunk) else _encodable(chunk)
            if chunk.finish_reason is not None:
                return
    finally:
        await _close(expert, chunks)


def _wrong(chunk: Any) -> str | None:
    """What breaks the contract of a chunk, if anything."""
    if not isinstance(chunk, Chunk) or not isinstance(chunk.text, str):
        return f"{type(chunk).__name__} instead of a Chunk with text"
    if chunk.finish_reason is None:
        return None
    if chunk.finish_reason not in _REASONS:
        return f"the finish reason {chunk.finish_reason!r:.80}"
    return None if isinstance(chunk.usage, Usage) else "a last chunk without usage"


def _is_plain(chunk: Chunk) -> bool:
    return chunk.text.isascii() and chunk.reasoning.isascii() and not chunk.tool_calls


def _encodable(chunk: Chunk) -> Chunk:
    """The chunk with "?" for lone surrogates, which no response can carry."""
    calls = tuple(
        replace(call, id=_text(call.id), name=_text(call.name), arguments=_text(call.arguments))
        for call in chunk.tool_calls
    )
    return replace(chunk, text=_text(chunk.text), reasoning=_text(chunk.reasoning), tool_calls=calls)


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


async def _close(expert: str, chunks: Any) -> None:
    """Close the engine's iterator; the answer does not fail if that does."""
    if (close := getattr(chunks, "aclose", None)) is None:
        return  # an iterator that is no generator holds nothing open
    try:
        await close()
    except BaseException as error:
        if is_interrupt(error):
            raise
        logger.warning("expert %r: closing its answer failed: %s", expert, text_of(error), exc_info=error)
